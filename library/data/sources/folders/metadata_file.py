"""Metadata files: captions and tags of many images in one .json or .jsonl file."""

import io
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.base.errors import UserError, error_in
from library.base.json_text import InvalidJson, parse_json
from library.options.config_file import read_json, read_text
from library.options.kinds import TABLE, TEXT, read_value

FLAG = "metadata_file"
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
    if path.lower().endswith(".jsonl"):
        # StringIO splits at newlines only. str.splitlines would also split at U+2028, which JSON allows inside strings.
        yield from _json_lines(path, io.StringIO(read_text(Path(path), FLAG)))
        return
    table = read_value(read_json(Path(path), FLAG), TABLE, f"{FLAG} {path}")
    for key, value in table.items():
        yield key, _checked(value, f"{FLAG} {path}: {key}")


def _json_lines(path: str, lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{FLAG} {path}, line {number}"
        try:
            value = read_value(parse_json(line), TABLE, place)
        except InvalidJson as error:
            raise UserError(f"{place} is not valid JSON: {error}") from None
        if "image_path" not in value:
            raise error_in("image_path", cause="missing")(
                f"{place}: image_path is missing", "add the path of the image"
            )
        yield read_value(value.pop("image_path"), TEXT, f"{place}: image_path"), _checked(value, place)


def _checked(value: Any, place: str) -> dict[str, Any]:
    table: dict[str, Any] = read_value(value, TABLE, place)
    texts = [name for name in ("caption", "tags") if table.get(name) is not None]
    for name in (*texts, *_reference_names(table, place)):
        read_value(table[name], TEXT, f"{place}: {name}")
    return table


def _reference_names(value: Mapping[str, Any], place: str = "") -> list[str]:
    """Return the keys of the reference images, in order. Raises UserError if their numbers have a gap."""
    # Python converts no numbers of thousands of digits, and nine are more than any image needs.
    numbered = sorted((int(match[1][:9]), name) for name in value if (match := REFERENCE.fullmatch(name)))
    names = [name for _, name in numbered]
    if "control_path" in value:
        names = ["control_path", *names]
    first = numbered[0][0] if numbered else 0
    has_gap = [number for number, _ in numbered] != list(range(first, first + len(numbered)))
    if has_gap or (numbered and len(names) > len(numbered)):
        raise error_in("control_path")(
            f"{place} has {', '.join(names)}",
            "name one reference image as control_path, or several as control_path_0, control_path_1 and so on "
            "without a gap",
        )
    return names


def _entry(value: Mapping[str, Any]) -> MetadataEntry:
    return MetadataEntry(
        value.get("caption"), value.get("tags"), tuple(value[name] for name in _reference_names(value))
    )
