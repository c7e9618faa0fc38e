"""Tables of TOML and JSON files, checked against the keys that their readers declare."""

from collections.abc import Callable, Mapping
from typing import Any

from library.base.errors import error_in
from library.base.suggestions import did_you_mean
from library.options.kinds import Kind, explain_unfit

Table = Mapping[str, Any]


def is_table_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def find_problem(
    name: str, value: Any, kinds: Mapping[str, Kind], setting: str, explain: Callable[[str], str] = lambda name: ""
) -> str | None:
    """Return a sentence if the key is unknown or the value does not fit; `setting` names the key in its place, and
    `explain` says what to use for a name of another program."""
    if name not in kinds and (hint := explain(name)):
        return f"{setting} is not a key; {hint}"
    if name not in kinds:
        return f"{setting} is not a key{did_you_mean(name, kinds) or '; use ' + ', '.join(kinds)}"
    return explain_unfit(value, kinds[name], setting)


def read_table(table: Table, kinds: Mapping[str, Kind], describe: Callable[[str], str]) -> dict[str, Any]:
    """Return the values of a table converted; None counts as not given. `describe` names a key in its place.

    Raises UserError for the first key that is unknown and the first value that does not fit.
    """
    given = {name: value for name, value in table.items() if value is not None or name not in kinds}
    for name, value in given.items():
        if problem := find_problem(name, value, kinds, describe(name)):
            raise error_in(name)(problem)
    return {name: kinds[name].convert(value) for name, value in given.items()}
