"""Metadata files: captions and tags of many pictures in one .json or .jsonl file."""

import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from library.errors import UserError
from library.options.encodings import decoded


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    """What a metadata file says about one picture. Sizes in it are not used: the picture's header is surer."""

    caption: str | None
    tags: str | None


def read_metadata(path: str) -> Iterator[tuple[str, MetadataEntry]]:
    """(key, entry) of every picture; ValueError names the file, and the line or key of a mistake."""
    if not os.path.isfile(path):
        raise UserError(f"metadata_file {path}: there is no such file")
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"metadata_file {path} cannot be read: {error.strerror}; change its rights") from error
    text = decoded(content, f"metadata_file {path}")
    yield from _json_lines(path, io.StringIO(text)) if path.lower().endswith(".jsonl") else _json_table(path, text)


def _json_table(path: str, text: str) -> Iterator[tuple[str, MetadataEntry]]:
    try:
        table = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"metadata_file {path} is not valid JSON: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"metadata_file {path} must hold a table of pictures, not {type(table).__name__}")
    for key, value in table.items():
        yield key, _entry(value, f"{path}: {key}")


def _json_lines(path: str, lines: Iterator[str] | Any) -> Iterator[tuple[str, MetadataEntry]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"metadata_file {path}, line {number} is not valid JSON: {error}") from None
        if not isinstance(value, dict) or not isinstance(value.get("image_path"), str):
            raise UserError(f"metadata_file {path}, line {number}: image_path is missing")
        yield value["image_path"], _entry(value, f"{path}, line {number}")


def _entry(value: Any, place: str) -> MetadataEntry:
    if not isinstance(value, dict):
        raise UserError(f"metadata_file {place} must be a table with caption or tags, not {value!r}")
    for name in ("caption", "tags"):
        if value.get(name) is not None and not isinstance(value[name], str):
            raise UserError(f"metadata_file {place}: {name} is {value[name]!r}, but must be a string")
    return MetadataEntry(value.get("caption"), value.get("tags"))
