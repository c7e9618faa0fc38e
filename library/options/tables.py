"""Tables of TOML and JSON files, checked against the keys that their readers declare."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from library.errors import UserError
from library.options.ranges import is_finite_number
from library.suggestions import did_you_mean

MOST_SHOWN = 80  # characters of a value in an error
Table = Mapping[str, Any]


@dataclass(frozen=True)
class Kind:
    """A type of value: its name in errors, its check, and its conversion."""

    name: str
    fits: Callable[[Any], bool]
    convert: Callable[[Any], Any] = lambda value: value
    choices: tuple[str, ...] = ()


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


TEXT = Kind("text in quotes", lambda v: isinstance(v, str))
TEXTS = Kind(
    "text in quotes, or a list of such texts",
    lambda v: isinstance(v, str) or (is_texts(v) and bool(v)),
    lambda v: (v,) if isinstance(v, str) else tuple(v),
)
BOOL = Kind("true or false", lambda v: isinstance(v, bool))
TABLE = Kind("a table", lambda v: isinstance(v, dict))


def is_table_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def choice(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", lambda v: v in names, choices=names)


def number(low: float | None, high: float) -> Kind:
    """Return the kind of finite numbers in a range; with `low` None, of both signs."""
    least = -high if low is None else low
    return Kind(f"a number{_name_range(low, high)}", lambda v: is_finite_number(v) and least <= v <= high, float)


def whole(low: int | None, high: int) -> Kind:
    """Return the kind of whole numbers in a range. A whole float such as 512.0 is one: some front ends write them."""
    in_range = number(low, high).fits
    return Kind(f"a whole number{_name_range(low, high)}", lambda v: in_range(v) and v == int(v), int)


def size(low: int, high: int, order: str) -> Kind:
    """Return the kind of one side or two sides, of which `order` says the order; the value is a pair."""
    side = whole(low, high)
    return Kind(
        f"a side{_name_range(low, high)}, or {order}",
        lambda v: side.fits(v) or (isinstance(v, (list, tuple)) and len(v) == 2 and all(map(side.fits, v))),
        lambda v: (int(v[0]), int(v[1])) if isinstance(v, (list, tuple)) else (int(v), int(v)),
    )


def _name_range(low: float | None, high: float) -> str:
    limit = f"{high:g}" if isinstance(high, float) else str(high)
    return f" up to {limit}" if low is None else f" from {low:g} to {limit}"


def find_problem(name: str, value: Any, kinds: Mapping[str, Kind], setting: str) -> str | None:
    """Return a sentence if the key is unknown or the value does not fit; `setting` names the key in its place."""
    if name not in kinds:
        return f"{setting} is not a key{did_you_mean(name, kinds) or '; use ' + ', '.join(kinds)}"
    return explain_unfit(value, kinds[name], setting)


def explain_unfit(value: Any, kind: Kind, setting: str) -> str | None:
    """Return a sentence if the value of `setting` does not fit."""
    if kind.fits(value):
        return None
    text = repr(value) if len(repr(value)) <= MOST_SHOWN else f"{repr(value)[:MOST_SHOWN]} ..."
    return f"{setting} is {text}{did_you_mean(str(value), kind.choices)}, but must be {kind.name}"


def read_value(value: Any, kind: Kind, setting: str) -> Any:
    """Return a value converted. Raises UserError if it does not fit."""
    if problem := explain_unfit(value, kind, setting):
        raise UserError(problem)
    return kind.convert(value)


def read_table(table: Table, kinds: Mapping[str, Kind], describe: Callable[[str], str]) -> dict[str, Any]:
    """Return the values of a table converted; None counts as not given. `describe` names a key in its place.

    Raises UserError for the first key that is unknown and the first value that does not fit.
    """
    given = {name: value for name, value in table.items() if value is not None or name not in kinds}
    for name, value in given.items():
        if problem := find_problem(name, value, kinds, describe(name)):
            raise UserError(problem, setting=name)
    return {name: kinds[name].convert(value) for name, value in given.items()}
