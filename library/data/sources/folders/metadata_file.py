"""Metadata files: captions and tags of many images in one .json or .jsonl file."""

import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from library.errors import UserError
from library.json_text import InvalidJson, parse_json
from library.options.encodings import decode_utf8

REFERENCE = re.compile(r"control_path_(\d+)")


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    """The entry of an image in a metadata file. The size that it may contain is ignored, because the header is more
    reliable."""

    caption: str | None
    tags: str | None
    references: tuple[str, ...] = ()  # control_path, or control_path_0, control_path_1, ...


def read_metadata(path: str) -> Iterator[tuple[str, MetadataEntry]]:
    """Yield (key, entry) of every image. Raises UserError naming the file, and the line or key of a mistake."""
    for key, value in _values(path):
        yield key, _entry(value)


def read_table(path: str) -> dict[str, dict[str, Any]]:
    """Read the whole file as a dictionary by key. Raises UserError as `read_metadata` does."""
    return dict(_values(path))


def parse_entries(table: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, MetadataEntry]]:
    """Return the entries from a table that has already been read, as `read_metadata` yields them."""
    return [(key, _entry(value)) for key, value in table.items()]


def _values(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not os.path.isfile(path):
        raise UserError(f"metadata_file {path}: there is no such file")
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"metadata_file {path} cannot be read: {error.strerror}; change its permissions") from error
    text = decode_utf8(content, f"metadata_file {path}")
    # StringIO splits at newlines only. str.splitlines would also split at U+2028, which JSON allows inside strings.
    yield from _json_lines(path, io.StringIO(text)) if path.lower().endswith(".jsonl") else _json_table(path, text)


def _json_table(path: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        table = parse_json(text)
    except InvalidJson as error:
        raise UserError(f"metadata_file {path} is not valid JSON: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"metadata_file {path} must hold a table of images, not {type(table).__name__}")
    for key, value in table.items():
        yield key, _checked(value, f"{path}: {key}")


def _json_lines(path: str, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except InvalidJson as error:
            raise UserError(f"metadata_file {path}, line {number} is not valid JSON: {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get("image_path"), str):
            raise UserError(f"metadata_file {path}, line {number}: image_path is missing")
        key = value.pop("image_path")
        yield key, _checked(value, f"{path}, line {number}")


def _checked(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"metadata_file {place} must be a table with caption or tags, not {value!r}")
    for name in ("caption", "tags"):
        if value.get(name) is not None and not isinstance(value[name], str):
            raise UserError(f"metadata_file {place}: {name} is {value[name]!r}, but must be a string")
    _references(value, place)
    return value


def _references(value: Mapping[str, Any], place: str = "") -> tuple[str, ...]:
    """Return the reference images, in order. Raises UserError if their numbers have a gap, or if a value is not a
    string."""
    numbered = sorted((int(match[1]), name) for name in value if (match := REFERENCE.fullmatch(name)))
    names = [name for _, name in numbered]
    if "control_path" in value:
        names = ["control_path", *names]
    first = numbered[0][0] if numbered else 0
    has_gap = [number for number, _ in numbered] != list(range(first, first + len(numbered)))
    if has_gap or (numbered and len(names) > len(numbered)):
        raise UserError(
            f"metadata_file {place} has {', '.join(names)}; name one reference image as control_path, or several as "
            "control_path_0, control_path_1 and so on without a gap"
        )
    for name in names:
        if not isinstance(value[name], str):
            raise UserError(f"metadata_file {place}: {name} is {value[name]!r}, but must be a string")
    return tuple(value[name] for name in names)


def _entry(value: Mapping[str, Any]) -> MetadataEntry:
    return MetadataEntry(value.get("caption"), value.get("tags"), _references(value))
