"""A translation while it is made."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from library.architectures.scripts import list_scripts
from library.options.declared import Declared
from library.options.leco import LecoOptions
from library.options.other_programs import Equivalent, Program

How = Literal["equal", "converted", "missing", "idle"]
"""The result of translating a setting: the same option or value; another form with the same effect; nothing, which
differs from the other trainer; nothing, which does not."""


@dataclass(frozen=True)
class Line:
    """A value here, and the settings that it comes from."""

    value: Any
    origins: tuple[str, ...]
    is_weak: bool = False  # a default of the other trainer, or a companion: another setting replaces it


@dataclass(frozen=True)
class Outcome:
    """A setting of the other trainer, and how it was translated."""

    name: str
    value: Any
    place: str
    how: How
    text: str = ""  # what happens instead, or why nothing is set


@dataclass
class Draft:
    """The options, dataset keys and prompts of a translation while settings are added."""

    program: Program
    script: str  # "" if the file does not say
    known: Mapping[str, Declared]  # options of the script
    values: Mapping[str, Any]  # the other trainer's settings by name, with its defaults, without those of subsets
    options: dict[str, Line] = field(default_factory=dict)
    arguments: dict[str, Line] = field(default_factory=dict)  # of --network_args
    optimizer: dict[str, Line] = field(default_factory=dict)  # of --optimizer_args
    general: dict[str, Line] = field(default_factory=dict)  # keys of all subsets
    subsets: dict[int, dict[str, Line]] = field(default_factory=dict)
    letters: dict[str, Any] = field(default_factory=dict)  # of every prompt line
    prompts: list[Any] = field(default_factory=list)
    kept: dict[str, Line] = field(default_factory=dict)  # options of a number of files, which become steps

    def put(self, table: dict[str, Line], name: str, line: Line) -> None:
        """Add a value; a weak one replaces none, and one that is not replaces a weak one."""
        if name in table and (line.is_weak or line.value == table[name].value):
            if not line.is_weak and table[name].is_weak:
                table[name] = line
            return
        table[name] = line

    def find_option(self, entry: Equivalent) -> str | None:
        """Return the option of an entry that the script has."""
        return next((name for name in entry.options if name in self.known), None)

    def meets(self, conditions: str) -> bool:
        """Return True if the settings meet all of an entry's `only_with`."""
        return all(self.meets_one(condition) for condition in conditions.split(" & ")) if conditions else True

    def meets_one(self, condition: str) -> bool:
        name, equals, words = condition.removeprefix("!").partition("=")
        value = self.values.get(name)
        is_met = to_word(value) in words.split("|") if equals else not is_off(value) and value != 0
        return is_met is not condition.startswith("!")


def is_off(value: Any) -> bool:
    """Return True for a value that switches a setting off."""
    return value is None or value is False or value in ("", [], {}, "OFF", "NEVER", "none", "NONE")


def find_script(program: Program, values: Mapping[str, Any], script: str) -> str:
    """Return the script here that trains what the settings name, or ""."""
    words = {"script": script, **values}
    for name, scripts in program.base.items():
        value = words.get(name)
        found = None if is_off(value) else scripts.get(to_word(value))
        if found is not None:
            return found
    return ""


def list_options(script: str) -> Mapping[str, Declared]:
    """Return the declarations of a script's options; of all scripts for ""."""
    known = dict[str, Declared]()
    for other in list_scripts():
        if script in ("", other.name):
            known |= other.options.declarations()
    return known or LecoOptions.declarations()


def to_word(value: Any) -> str:
    """Return a value as the tables of other programs write it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def merge(line: Line, value: Any, origin: str) -> Line:
    return replace(line, value=value, origins=(*line.origins, origin))
