"""Index rows of images in tar and Parquet files, read with minimal I/O."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from library.base.errors import UserError, error_in, reason_of
from library.base.json_text import parse_json
from library.data.decoding.images import HEAD_BYTES, read_size
from library.data.description.buckets import Size
from library.data.description.image_extensions import PLUGINS, image_extensions
from library.data.scanned.images import END_BYTES, digest_content, digest_of_ends
from library.data.sources.folders.image_headers import plain_size
from library.data.sources.folders.reading import MOST_CAPTION_BYTES, stripped_lines
from library.data.sources.indexed.tar_files import Member, iterate_members
from library.data.sources.storage.ranges import RangeFile, Window

CAPTION_FIELDS = ("caption", "text", "prompt")  # in a .json member, without caption_column
DOTTED = "is skipped: the name of an image in a tar file ends at its first dot; rename it without other dots"
REFERENCE = re.compile(r"control(?:_([0-9]{1,4}))?\.(\w+)")  # 000001.control.jpg, or 000001.control_0.jpg and so on


class ReferenceRow(NamedTuple):
    """A reference image in the same file as its image."""

    name: str
    start: int
    num_bytes: int
    width: int
    height: int
    digest: bytes


class Row(NamedTuple):
    """The index row of an image."""

    name: str  # within its file
    start: int  # byte, or row of a Parquet file
    num_bytes: int
    width: int
    height: int
    caption: str | None  # stripped lines
    digest: bytes  # 16 bytes, see `digest_of_ends`
    problem: str | None = None  # why it cannot be used, as a continuation of its name
    url: str | None = None  # its location, if it is a separate file
    references: tuple[ReferenceRow, ...] = ()

    @property
    def as_reference(self) -> ReferenceRow:
        return ReferenceRow(self.name, self.start, self.num_bytes, self.width, self.height, self.digest)

    def with_references(self, rows: Iterable["Row"]) -> "Row":
        """Add references to the image. A reference that cannot be used becomes the image's problem."""
        rows = list(rows)
        broken = next((f"has a reference image, {row.name}, that {row.problem}" for row in rows if row.problem), None)
        return self._replace(references=tuple(row.as_reference for row in rows), problem=self.problem or broken)


@dataclass(frozen=True)
class CaptionRule:
    """Where captions of a tar file are found."""

    ending: str  # extension of the member that is preferred, without dot
    field: str | None  # field of .json members; None tries CAPTION_FIELDS


def rows_of_tar(window: Window, label: str, rule: CaptionRule) -> list[Row]:
    """Return the images of a tar file, in order. Raises UserError if it is damaged, or if captions are not UTF-8."""
    # Images whose plug-in is missing become rows with that problem.
    endings = {ending[1:] for ending in image_extensions()}.union(PLUGINS, map(str.upper, PLUGINS))
    caption_endings = (rule.ending, "txt", "json")
    images: dict[str, Row] = {}
    duplicates: list[Row] = []
    references: dict[str, dict[int, Row]] = {}  # by number, -1 if unnumbered
    dotted: list[Member] = []  # images with another dot in their name, such as 000001.depth.png or my.cat.jpg
    texts: dict[str, dict[str, str]] = {}
    for member in iterate_members(window, label):
        if member.ending in endings:
            row = build_row(window, member, label)
            if member.stem in images:
                duplicates.append(row._replace(problem=f"is skipped: {images[member.stem].name} has the same name"))
            else:
                images[member.stem] = row
        elif (reference := REFERENCE.fullmatch(member.ending)) and reference[2].lower() in endings:
            number = -1 if reference[1] is None else int(reference[1])
            references.setdefault(member.stem, {})[number] = build_row(window, member, label)
        elif member.ending in caption_endings:
            text = read_caption_text(window, member, label, rule)
            if text is not None:
                texts.setdefault(member.stem, {})[member.ending] = text
        elif member.ending.rpartition(".")[2] in endings and member.stem.rpartition("/")[2]:  # else a hidden file
            dotted.append(member)
    image_rows = [
        with_numbered(row, references.pop(stem, {}))._replace(
            caption=next((stem_texts[ending] for ending in caption_endings if ending in stem_texts), None)
        )
        for stem, row in images.items()
        for stem_texts in (texts.get(stem, {}),)
    ]
    unused = [
        row._replace(problem="is a reference image without an image")
        for stem_references in references.values()
        for row in stem_references.values()
    ]
    # Beside an image they are something else, such as its depth; alone they are images that would be lost silently.
    lost = [
        Row(member.name, member.start, member.num_bytes, 0, 0, None, bytes(16), DOTTED)
        for member in dotted
        if member.stem not in images
    ]
    return sorted([*image_rows, *duplicates, *unused, *lost], key=lambda row: row.start)


def with_numbered(row: Row, references: Mapping[int, Row]) -> Row:
    """Add an image's references in order. Numbers that are not consecutive from 0 or 1 become the image's problem."""
    numbers = sorted(references)
    if numbers not in ([-1], list(range(len(numbers))), list(range(1, len(numbers) + 1))):
        names = ", ".join(references[number].name for number in numbers)
        return row._replace(problem=f"has reference images that are not numbered consecutively: {names}")
    return row.with_references(references[number] for number in numbers)


def build_row(window: Window, member: Member, label: str) -> Row:
    """Return the row of an image without its caption, from the start and the end of its content."""
    head = window.read(member.start, min(HEAD_BYTES, member.num_bytes))
    part = RangeFile(window, member.start, member.num_bytes)
    size, problem = measure_image(f"{label}/{member.name}", head, member.num_bytes, part)
    tail = window.read(member.start + max(0, member.num_bytes - END_BYTES), min(END_BYTES, member.num_bytes))
    digest = bytes.fromhex(digest_of_ends(head[:END_BYTES] + tail, member.num_bytes))
    return Row(member.name, member.start, member.num_bytes, *size, None, digest, problem)


def measure_image(path: str, head: bytes, num_bytes: int, content: bytes | RangeFile) -> tuple[Size, str | None]:
    """Return (the size of an image, why it cannot be used). Pillow reads more of `content` if `head` does not
    suffice."""
    try:
        return plain_size(head, num_bytes) or read_size(path, content), None
    except (UserError, OSError) as error:
        return (0, 0), reason_of(error) or "cannot be read"


def read_caption_text(window: Window, member: Member, label: str, rule: CaptionRule) -> str | None:
    """Return the stripped lines of a caption member; None for a .json without a caption. Raises UserError if it
    cannot be read."""
    name = f"{label}/{member.name}"
    if member.num_bytes > MOST_CAPTION_BYTES:
        raise error_in(path=name)(f"the caption {name} has {member.num_bytes / 1e6:.1f} MB, too much for a caption")
    content = window.read(member.start, member.num_bytes)
    try:
        text = content.decode("utf-8-sig")
        caption = read_caption_field(parse_json(text), rule.field) if member.ending == "json" else text
    except UnicodeDecodeError as error:
        raise error_in(path=name)(
            f"the caption {name} is not UTF-8: byte {error.start}", "rewrite the tar file"
        ) from None
    except ValueError as error:
        raise error_in(path=name, cause="unreadable")(f"{name} is not valid JSON: {error}") from None
    return None if caption is None else stripped_lines(caption)


def read_caption_field(value: Any, field: str | None) -> str | None:
    """Return the caption in the content of a .json member, or None."""
    if not isinstance(value, Mapping):
        return None
    fields: Iterable[str] = CAPTION_FIELDS if field is None else (field,)
    return next((value[name] for name in fields if isinstance(value.get(name), str)), None)


def row_of_bytes(name: str, number: int, content: bytes | None, caption: str | None, label: str) -> Row:
    """Return the row of an image whose bytes are a value in a Parquet file."""
    if content is None:
        return Row(name, number, 0, 0, 0, caption, bytes(16), "has no bytes in the file")
    size, problem = measure_image(f"{label}/{name}", content[:HEAD_BYTES], len(content), content)
    return Row(name, number, len(content), *size, caption, bytes.fromhex(digest_content(content)), problem)
