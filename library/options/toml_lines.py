"""The line of a key in a TOML file, which Python's parser does not tell."""

import re
from collections.abc import Iterator
from pathlib import Path

HEADER = re.compile(r"""\s*(\[\[?)([\w.\s"'-]+)\]\]?\s*(?:#.*)?$""")
KEY = re.compile(r"""\s*(["']?)([\w-]+)\1\s*=""")
STEP = re.compile(r"\['(\w+)'\]|\[(\d+)\]")
NUMBERED = re.compile(r"\[\[([\w.]+)\]\] number (\d+)")


def find_line(path: Path, setting: str, place: str | None) -> int | None:
    """Return the line of a key (a flag stands for the option's name) in the table that the place of an error names, or
    in any table without a place; None if the file does not say it in one place and plainly."""
    name = setting.partition(" ")[0].removeprefix("--")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError):
        return None
    if '"""' in text or "'''" in text:  # which may hold lines that look like keys
        return None
    table = None if place is None else table_of(place)
    lines = [line for line, where, key in list_keys(text) if key == name and table in (None, where)]
    return lines[0] if len(lines) == 1 else None


def table_of(place: str) -> str:
    """Return the table of a place as `list_keys` writes it."""
    if numbered := NUMBERED.search(place):
        return f"{numbered[1]}[{int(numbered[2]) - 1}]"
    return "".join(f".{step[1]}" if step[1] else f"[{step[2]}]" for step in STEP.finditer(place)).removeprefix(".")


def list_keys(text: str) -> Iterator[tuple[int, str, str]]:
    """Yield (line, table, key); the table is "" at the top, and an entry of an array as in datasets[0].subsets[2]."""
    table, last = "", dict[str, int]()
    for line, content in enumerate(text.splitlines(), start=1):
        if header := HEADER.match(content):
            table = open_table([part.strip(" \t\"'") for part in header[2].split(".")], header[1] == "[[", last)
        elif key := KEY.match(content):
            yield line, table, key[2]


def open_table(parts: list[str], is_entry: bool, last: dict[str, int]) -> str:
    """Return the table that a header begins; `last` counts the entries of arrays."""
    table = ""
    for depth, part in enumerate(parts, start=1):
        table = f"{table}.{part}".removeprefix(".")
        if is_entry and depth == len(parts):
            last[table] = last.get(table, -1) + 1
        table += f"[{last[table]}]" if table in last else ""
    return table
