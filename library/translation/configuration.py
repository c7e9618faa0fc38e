"""The settings of another trainer, as its file has them."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One setting of another trainer."""

    name: str  # dotted, as in library/options/names
    value: Any
    place: str  # in the file, for people
    subset: int | None = None  # the set of images that it is for


@dataclass(frozen=True)
class Configuration:
    """The content of another trainer's file."""

    program: str  # a file of library/options/names
    settings: tuple[Setting, ...]
    script: str = ""  # the other trainer's script, where its name says what is trained
    remarks: tuple[str, ...] = ()


def flatten(
    table: Mapping[str, Any], names: Collection[str], prefix: str = "", place: str = "", subset: int | None = None
) -> Iterator[Setting]:
    """Yield the settings of nested tables; a table whose dotted name is one of `names` is a value itself."""
    for key, value in table.items():
        name, where = f"{prefix}{key}", f"{place}{key}"
        if isinstance(value, dict) and name not in names and value:
            yield from flatten(value, names, f"{name}.", f"{where}.", subset)
        else:
            yield Setting(name, value, where, subset)


def flatten_list(tables: Any, names: Collection[str], name: str, place: str) -> Iterator[Setting]:
    """Yield the settings of a list of tables, each a set of images."""
    for number, table in enumerate(tables if isinstance(tables, list) else []):
        if isinstance(table, dict):
            yield from flatten(table, names, f"{name}.", f"{place}[{number}].", number)
