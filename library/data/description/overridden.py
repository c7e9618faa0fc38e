"""Options whose values a dataset file replaces."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from library.data.description.keys import Style
from library.data.description.schema import ALL_KEYS, DATASET_KEYS
from library.options.declared import Declared
from library.options.no_effect import is_set

Table = Mapping[str, Any]


def given_keys(fallbacks: Table) -> list[Declared]:
    """Return the keys whose options differ from their defaults; `fallbacks` holds the values of options by key."""
    return [key for key in keys_with_options(fallbacks) if is_set(key.kind.convert(fallbacks[key.name]), key.default)]


def typed_default_keys(fallbacks: Table, typed: Collection[str]) -> list[Declared]:
    """Return the keys whose options, among the names in `typed`, have their defaults."""
    given = given_keys(fallbacks)
    return [key for key in keys_with_options(fallbacks) if key.flag in typed and key not in given]


def keys_with_options(fallbacks: Table) -> list[Declared]:
    return [key for key in ALL_KEYS.values() if key.flag is not None and fallbacks.get(key.name) is not None]


def find_overridden(
    keys: Sequence[Declared], datasets: Sequence[tuple[Table, Style]], general: Table, fallbacks: Table, path: str
) -> Iterator[str]:
    """Yield a line for every one of `keys` whose option the dataset file at `path` overrides with another value."""
    for key in keys:
        value = fallbacks[key.name]
        given = key.kind.convert(value)
        in_file = list(values_in_file(key, datasets, general))
        others = list(dict.fromkeys(format_value(v) for v in in_file if v is not None))
        if not others or given in in_file:
            continue
        num_used = in_file.count(None)
        unit = "data sets" if key in DATASET_KEYS else "subsets"
        effect = f"is used in {num_used} of {len(in_file)} {unit} only" if num_used else "has no effect"
        option = f"--{key.flag}" if value is True else f"--{key.flag} {format_value(given)}"
        yield f"{option} {effect}: {path} sets {key.name} = {' and '.join(others)}; change it there"


def values_in_file(key: Declared, datasets: Sequence[tuple[Table, Style]], general: Table) -> Iterator[Any]:
    """Yield the file's value for each data set, or for each subset if the key belongs there; None if it sets none."""
    for dataset, style in datasets:
        if style not in key.styles:
            continue
        for subset in ({},) if key in DATASET_KEYS else dataset["subsets"]:
            found = (table[key.name] for table in (subset, dataset, general) if table.get(key.name) is not None)
            value = next(found, None)
            yield None if value is None else key.kind.convert(value)


def format_value(value: Any) -> str:
    """Format a value as in the file; a square as one side."""
    if isinstance(value, tuple):
        return str(value[0]) if value[0] == value[-1] else ",".join(map(str, value))
    return json.dumps(value, ensure_ascii=False)
