"""The mark by which a command knows the files that it wrote: its name and the file's.

Images, adapters, checkpoints, archives and model folders carry it in a field that other programs ignore. The file's
name is part of it, so that a copy under another name does not count as the command's own file.
"""

import json
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from library.errors import UserError
from library.json_text import parse_json

if TYPE_CHECKING:
    from PIL import Image

MARK_FIELD = "written_by"
RUN = "training"  # the writer of what training runs save
PNG_START, JPEG_START, ZIP_START = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"PK"
TAR_AT, TAR_WORD = 257, b"ustar"
JPEG_QUALITY = 100
INDEX = "model_index.json"  # of a diffusers folder, which ignores keys that begin with _
FOLDER_FIELD, COUNT_FIELD = f"_{MARK_FIELD}", "_num_files"
DAMAGE = (
    UserError, OSError, ValueError, KeyError, TypeError, EOFError, struct.error, SyntaxError, tarfile.TarError,
    zipfile.BadZipFile, NotImplementedError,
)  # fmt: skip


def mark_of(writer: str, path: Path) -> str:
    """Return the mark of a file that `writer` (a command, or a run) writes to `path`."""
    return f"{writer}: {path.name}"


def read_mark(path: Path) -> str | None:
    """Return the mark of a file or a diffusers folder; None if it has none, or cannot be read."""
    try:
        return _read_folder_mark(path) if path.is_dir() else _read_file_mark(path)
    except DAMAGE:
        return None


def _read_folder_mark(folder: Path) -> str | None:
    fields = parse_json((folder / INDEX).read_text(encoding="utf-8"))
    # A file that was added since would be lost with the folder.
    is_whole = COUNT_FIELD not in fields or fields[COUNT_FIELD] == count_files(folder)
    return str(fields[FOLDER_FIELD]) if is_whole else None


def _read_file_mark(path: Path) -> str | None:
    from library.checkpoints.files import holds_safetensors, read_metadata  # it imports torch

    with path.open("rb") as file:
        start = file.read(TAR_AT + len(TAR_WORD))
    if start.startswith((PNG_START, JPEG_START)):
        return _read_image_mark(path)
    if start.startswith(ZIP_START):
        with zipfile.ZipFile(path) as archive:
            return archive.comment.decode("utf-8") or None
    if start[TAR_AT:] == TAR_WORD:
        with tarfile.open(path, "r:") as shard:
            return shard.pax_headers.get(MARK_FIELD)
    return read_metadata(path).get(MARK_FIELD) if holds_safetensors(path) else None


def _read_image_mark(path: Path) -> str | None:
    from PIL import Image

    try:
        with Image.open(path) as image:
            field = image.info.get(MARK_FIELD, image.info.get("comment"))
    except Image.DecompressionBombError:
        return None
    return field.decode("utf-8") if isinstance(field, bytes) else field


def save_image(path: Path, image: "Image.Image", mark: str, texts: Mapping[str, str] | None = None) -> None:
    """Write a PNG or JPEG atomically, with its mark and, in a PNG, further text fields."""
    from PIL.PngImagePlugin import PngInfo

    from library.checkpoints.files import atomic_path  # it imports torch

    with atomic_path(path) as temporary:
        if path.suffix.lower() in (".jpg", ".jpeg"):
            image.save(temporary, format="JPEG", quality=JPEG_QUALITY, comment=mark.encode())
            return
        info = PngInfo()
        # Texts may be in any language, and PNG's tEXt chunk holds Latin-1 only.
        for name, text in {**(texts or {}), MARK_FIELD: mark}.items():
            info.add_itxt(name, text)
        image.save(temporary, format="PNG", pnginfo=info)


def mark_folder(folder: Path, mark: str, counts_files: bool = True) -> None:
    """Add the mark to a complete diffusers folder's model_index.json; a folder without one stays unmarked.

    With `counts_files` the mark is void once the folder has another number of files.
    """
    path = folder / INDEX
    if not path.is_file():
        return
    fields = parse_json(path.read_text(encoding="utf-8"))
    content = {**fields, FOLDER_FIELD: mark} | ({COUNT_FIELD: count_files(folder)} if counts_files else {})
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def count_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))
