"""Differential output preservation of a subset: `diff_output_preservation` in its custom_attributes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.options.declared import declare, list_declared
from library.options.kinds import BOOL, TEXT, Kind, number, read_value, whole
from library.options.tables import Table

PRESERVATION = "diff_output_preservation"


@dataclass(frozen=True)
class Preservation:
    """The keys of the table; `true` stands for their defaults."""

    caption: str | None = declare(TEXT, None)
    """Caption of these samples, in place of their own."""
    weight: float = declare(number(0), 1.0)
    """Factor on their loss."""
    num_steps: int | None = declare(whole(1, 1000), None)
    """Train them at the noise levels of previews of so many steps."""
    outside_mask: bool = declare(BOOL, False)
    """Preserve only what the masks leave out, by its share; the rest is learned. The weight is for it."""


KEYS = list_declared(Preservation)
KIND = Kind("true, false or a table of its keys", lambda v: BOOL.fits(v) or (isinstance(v, dict) and bool(v)))


def read_preservation(attributes: Mapping[str, Any]) -> Preservation | None:
    """Return the preservation that a subset's custom_attributes ask for, if any."""
    value = attributes.get(PRESERVATION)
    if not value:
        return None
    given = {} if value is True else {name: value[name] for name in KEYS.keys() & value.keys()}
    return Preservation(**{name: KEYS[name].kind.convert(item) for name, item in given.items()})


def check_preservation(attributes: Table, place: str) -> Table:
    """Return the table, empty for `true`. Raises UserError for values that do not fit."""
    value = read_value(attributes.get(PRESERVATION, False), KIND, f"{place}: {PRESERVATION}")
    table: Table = value if isinstance(value, dict) else {}
    for name in KEYS.keys() & table.keys():
        read_value(table[name], KEYS[name].kind, f"{place}: {PRESERVATION}.{name}")
    return table
