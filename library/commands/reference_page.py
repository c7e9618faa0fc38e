"""The page docs/reference.md, rendered from the capabilities and from the names of other programs."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from library.architectures.scripts import describe_scripts
from library.options.other_programs import Equivalent, list_programs, read_program

HEAD = """\
# All settings

Written by `python3 tools/capabilities.py --docs docs/reference.md` from the declarations; edit those instead.

- [Options](#options)
- [Keys of a dataset file](#keys-of-a-dataset-file)
- [Network arguments](#network-arguments)
- [Names of other programs](#names-of-other-programs)
"""


def render_page(capabilities: Mapping[str, Any]) -> str:
    """Return the page as Markdown."""
    lines = [HEAD, "## Options", *render_options(capabilities["scripts"])]
    lines += [
        "",
        "## Keys of a dataset file",
        "",
        *render_table("key", map(describe_key, capabilities["dataset_keys"])),
    ]
    lines += ["", "## Network arguments", "", *render_table("argument", describe_arguments(capabilities))]
    lines += ["", "## Names of other programs", *render_names()]
    return "\n".join(lines) + "\n"


def render_options(scripts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a table for each group; an option is in that of the first script that has it."""
    owners: dict[str, list[str]] = {}
    first: dict[str, Mapping[str, Any]] = {}
    for script in scripts:
        for option in script["options"]:
            owners.setdefault(option["name"], []).append(script["name"])
            first.setdefault(option["name"], option)
    names = [script["name"] for script in scripts]
    for group in dict.fromkeys(option["group"] for option in first.values()):
        rows = []
        for name, option in first.items():
            if option["group"] == group:
                others = "" if len(owners[name]) == len(names) else f" ({describe_scripts(owners[name], names)})"
                rows.append((f"`{option['flag']}`", describe_value(option), option["help"] + others))
        yield from ("", f"### {group}", "", *render_table("option", rows))


def render_table(title: str, rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {title} | value | meaning |"
    yield "|---|---|---|"
    for cells in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def describe_value(setting: Mapping[str, Any]) -> str:
    """Return the type of a setting, or its choices, and its default."""
    choices = setting.get("choices")
    words = ", ".join(map(str, choices)) if choices else setting["type"] + (" ..." if setting["is_list"] else "")
    default = setting["default"]
    return words if default is None or default is False or default in ("", [], ()) else f"{words} ({default})"


LEVELS = {
    ("subset",): " In subsets only.",
    ("dataset", "subset"): " Not in [general].",
    ("general", "dataset"): " Not in subsets.",
}


def describe_key(key: Mapping[str, Any]) -> Sequence[str]:
    """Return the cells of a key of a dataset file, with where it may stand and the option that is its fallback."""
    fallback = key["default_option"]
    note = "" if fallback in (None, key["name"]) else f" Fallback: --{fallback}."
    choices = key["value"].removeprefix("one of ").split(", ") if key["value"].startswith("one of ") else None
    value = key["value"] if key["is_list"] else describe_value({**key, "choices": choices})
    return f"`{key['name']}`", value, key["help"] + note + LEVELS.get(tuple(key["levels"]), "")


def describe_arguments(capabilities: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    """Yield the cells of every network argument, with the modules that have it where they are few."""
    modules = capabilities["network_modules"]
    owners: dict[str, list[str]] = {}
    first: dict[str, Mapping[str, Any]] = {}
    for module in modules:
        for argument in module["arguments"]:
            owners.setdefault(argument["name"], []).append(module["network_module"])
            first.setdefault(argument["name"], argument)
    for name, argument in first.items():
        few = f" ({', '.join(owners[name])})" if len(owners[name]) <= len(modules) // 2 else ""
        names = ", ".join(f"`{spelling}`" for spelling in (name, *argument["aliases"]))
        needs = f" Needs {argument['needs']}." if argument["needs"] else ""
        yield names, describe_value(argument), argument["help"] + needs + few


def render_names() -> Iterator[str]:
    """Yield a table for each program with the names that mean something else here, or nothing."""
    for program in list_programs():
        entries = [entry for entry in read_program(program).values() if entry.name not in entry.options or entry.note]
        if entries:
            yield from ("", f"### {entries[0].program}", "", "| name | here |", "|---|---|")
            yield from (f"| `{entry.name}` | {describe_name(entry)} |" for entry in entries)


def describe_name(entry: Equivalent) -> str:
    """Return what stands here for a name of another program; of the same name, how its meaning differs."""
    return entry.note if entry.name in entry.options else entry.describe(None)
