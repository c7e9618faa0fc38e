"""Names of settings in other programs, and what stands for them here: names/<program>.json.

Read only for a hint, an ambiguous abbreviation or JSON. An entry of `names` is by the name there, dotted as in a YAML
or JSON file, and has one of `option` (several: that of the base model's script), `key` of a dataset file, `argument` of
--network_args, `optimizer` of --optimizer_args, `prompt` (the letters of a prompt line), or `none` with the reason.
`value` is what a mere switch stands for, `values` translate words (null: no equal), `convert` names how the value
changes, `beside` are settings that go with it, and `note` is for people. `same` lists values, or is true for all of
them, with which a `none` has the same effect as there. `only_with` lists settings that have to be on, be off (!name) or
have one of some values (name=A|B), joined by " & "; `otherwise` is what happens instead if they do not and it matters,
and `zero_is_off` says that 0 is no value. `since` and `scripts` say which version and scripts have the name; without
`scripts` all of them.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("names")
SD_SCRIPTS, MUSUBI_TUNER = "sd_scripts", "musubi_tuner"
ABBREVIATED = "0.10"  # of sd-scripts: later ones are not abbreviated in guides and front ends
DATA_TABLES = ("datasets.", "concepts.", "concepts.text.", "concepts.image.", "data_backend.")
CONVERSIONS: Mapping[str, str] = {  # what the value becomes, as the end of "use --option"
    "negate": "its opposite",
    "pair": "both as a pair",
    "pairs": "written name=value",
    "list": "one value of the list each",
    "patterns": "as regular expressions",
    "dot": "with its dot",
    "latest": "or --autoresume for the latest",
    "prompt_lines": "a file with a prompt a line",
    "folder_and_name": "its folder, and --output_name",
    "saves_to_steps": "in steps, not in files",
    "unit": "or the option of its unit",
    "thousandths": "in thousandths",
    "plus_one": "one more",
    "share_of_blocks": "as a number of blocks",
    "share_of_rate": "as a share of the learning rate",
    "megapixels": "in pixels",
    "hundredths": "as a share of the run",
    "prompt_text": "a file with a prompt a line",
    "sides": "as width,height",
    "size": "both sides",
}


@dataclass(frozen=True)
class Equivalent:
    """The option or key here for a name of another program, or why there is none."""

    program: str
    name: str
    option: str | list[str] = ""
    key: str = ""
    argument: str = ""
    optimizer: str = ""
    prompt: str = ""
    none: str = ""
    value: Any = None
    values: Mapping[str, Any] = field(default_factory=dict)
    convert: str = ""
    beside: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    same: bool | list[Any] = False
    only_with: str = ""
    otherwise: str = ""
    zero_is_off: bool = False
    since: str = ""
    scripts: tuple[str, ...] = ()

    @property
    def options(self) -> list[str]:
        return [self.option] if self.option and isinstance(self.option, str) else [*self.option]

    def describe(self, options: Collection[str] | None, has_note: bool = True) -> str:
        """Return what to use, or why there is nothing; `options` are the command's, None for those of any script."""
        if self.none:
            return self.none
        known = [option for option in self.options if options is None or option in options]
        if self.option and not known:
            return f"here it is --{' or --'.join(self.options)}, which this command does not have"
        beside = "".join(f" and {name} = {_format(value)}" for name, value in self.beside.items())
        value = "" if self.value is None else _format(self.value)
        if known:
            use = f"--{known[0]} {value}".rstrip() + beside.replace(" and ", " and --").replace(" = true", "")
        elif self.key:
            use = f"{self.key}{beside} in the dataset file"
        elif self.argument:
            use = f"--network_args {self.argument}={value or '…'}" + beside.replace(" and ", " ").replace(" = ", "=")
        else:
            use = f"--optimizer_args {self.optimizer}=…" if self.optimizer else f"--{self.prompt} in a prompt line"
        note = f"; {self.note}" if self.note and has_note else ""
        return f"use {use}" + (self.convert and f", {CONVERSIONS[self.convert]}") + note


def _format(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Program:
    """Facts about all files of a program: its scripts and defaults. Tables by script have "" for all scripts."""

    key: str  # the name of its file
    title: str
    extends: str = ""  # program whose names it has too
    base: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # setting -> its value -> script here
    defaults: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict
    )  # by script, here or there; "=name": its value
    always: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # script -> options that hold in every run
    letters: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # script -> letter of a prompt -> its own
    remarks: Mapping[str, str] = field(default_factory=dict)  # script -> what differs whatever a file says
    prompts: str = ""  # beginning of the names in the table of one prompt
    warms_constant: bool = False  # a constant rate has a warmup
    has_bucket_limits: bool = False

    def list_defaults(self, script: str, own_script: str = "") -> dict[str, Any]:
        """Return the defaults of what a script here trains, and of the program's own script."""
        tables = [self.defaults.get(name, {}) for name in dict.fromkeys(("", script, own_script))]
        return {name: value for table in tables for name, value in table.items()}

    def list_always(self, script: str) -> dict[str, Any]:
        return {**self.always.get("", {}), **self.always.get(script, {})}

    def list_remarks(self, script: str) -> list[str]:
        return [self.remarks[script]] if script in self.remarks else []

    def name_letter(self, script: str, letter: str) -> str:
        return self.letters.get(script, {}).get(letter, letter)

    def read_prompt(self, table: Mapping[str, Any], script: str) -> dict[str, Any]:
        """Return the letters of a prompt that is a table."""
        entries = {key: read_names(self.key).get(f"{self.prompts}{key}") for key in table}
        letters = {key: entry.prompt for key, entry in entries.items() if entry is not None and entry.prompt}
        return {self.name_letter(script, letter): table[key] for key, letter in letters.items()}


def list_programs() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


@cache
def read_whole_program(program: str) -> Program:
    content = json.loads((FOLDER / f"{program}.json").read_text(encoding="utf-8"))
    return Program(program, content["program"], **content.get("whole", {}))


@cache
def read_program(program: str) -> Mapping[str, Equivalent]:
    """Return what stands for each name of a program."""
    content = json.loads((FOLDER / f"{program}.json").read_text(encoding="utf-8"))
    return {name: Equivalent(content["program"], name, **entry) for name, entry in content["names"].items()}


def read_names(program: str) -> Mapping[str, Equivalent]:
    """Return what stands for each name in a program's files, also for those of the program that it extends."""
    base = read_whole_program(program).extends
    return {**(read_program(base) if base else {}), **read_program(program)}


def has_option(program: str, script: str, name: str, version: str = "") -> bool:
    """Return True if a program's script has an option, in a `version` if there is one; a script that the program lacks
    is taken to have what all of its scripts have."""
    entry = read_program(program).get(name)
    return entry is not None and (not entry.scripts or script in entry.scripts) and version in ("", entry.since)


def explain_name(name: str, options: Collection[str] | None = None, *, in_data: bool = False) -> str:
    """Return what to use for a name of other programs, or ""; `in_data` is for keys of a dataset file, and `options` as
    in `describe`."""
    places = ("", *DATA_TABLES) if in_data else ("",)
    programs = [read_program(program) for program in list_programs()]
    found = [next((p[place + name] for place in places if place + name in p), None) for p in programs]
    entries = [entry for entry in found if entry is not None and name not in entry.options]
    texts = dict[str, list[str]]()
    for entry in entries:
        texts.setdefault(entry.describe(options, has_note=len(entries) == 1), []).append(entry.program)
    if len(texts) == 1:
        return next(iter(texts))
    return "; ".join(f"{' and '.join(names)}: {text}" for text, names in texts.items())
