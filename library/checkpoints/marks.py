"""The mark by which a command knows the files that it wrote: its name and the file's, and a digest of the content.

Images, adapters, checkpoints, archives and model folders carry it in a field that other programs ignore. The file's
name is part of it, so that a copy under another name does not count as the command's own file; nor does a file whose
tensors or pixels another program has changed. Marks of earlier versions have no digest.
"""

import hashlib
import json
import re
import struct
import tarfile
import zipfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from library.base.atomic_files import atomic_path
from library.base.errors import UserError
from library.base.json_text import parse_json
from library.checkpoints.headers import holds_safetensors, read_metadata

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

MARK_FIELD = "written_by"
RUN = "training"  # the writer of what training runs save
PNG_START, JPEG_START, ZIP_START = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"PK"
TAR_AT, TAR_WORD = 257, b"ustar"
JPEG_SCAN = b"\xff\xda"  # the start of a JPEG's compressed pixels
JPEG_QUALITY = 100
SEAL_START = b"<!-- #"
WITH_DIGEST = re.compile(r"(?P<mark>.*) #(?P<digest>[0-9a-f]{32})", re.DOTALL)
INDEX = "model_index.json"  # of a diffusers folder, which ignores keys that begin with _
FOLDER_FIELD, COUNT_FIELD = f"_{MARK_FIELD}", "_num_files"
DAMAGE = (
    UserError, OSError, ValueError, KeyError, TypeError, EOFError, struct.error, SyntaxError, tarfile.TarError,
    zipfile.BadZipFile, NotImplementedError,
)  # fmt: skip


def mark_of(writer: str, path: Path) -> str:
    """Return the mark of a file that `writer` (a command, or a run) writes to `path`."""
    return f"{writer}: {path.name}"


def add_digest(mark: str, digest: str) -> str:
    """Return what is stored in a file for a mark and the digest of the content."""
    return f"{mark} #{digest}"


def split_mark(stored: str) -> tuple[str, str | None]:
    """Return (mark, digest) of what `add_digest` has returned; the digest of an older mark is None."""
    match = WITH_DIGEST.fullmatch(stored)
    return (stored, None) if match is None else (match["mark"], match["digest"])


def read_mark(path: Path) -> str | None:
    """Return the mark of a file or a diffusers folder; None if it has none, or cannot be read."""
    try:
        stored = _read_folder_mark(path) if path.is_dir() else _read_file_mark(path)
    except DAMAGE:
        return None
    return None if stored is None else split_mark(stored)[0]


def has_changed(path: Path) -> bool:
    """Return True if the content of a marked file or folder is not what its mark says. Reads it whole."""
    try:
        stored = _read_folder_mark(path) if path.is_dir() else _read_file_mark(path)
        digest = None if stored is None else split_mark(stored)[1]
        return digest is not None and digest != _digest_of(path)
    except DAMAGE:
        return True


def _digest_of(path: Path) -> str:
    from library.checkpoints.files import load_state_dict  # it imports torch

    if path.is_dir():
        return digest_folder(path)
    with path.open("rb") as file:
        start = file.read(len(PNG_START))
    if start.startswith(JPEG_START):
        return digest_scan(path.read_bytes())
    if start.startswith(PNG_START):
        from PIL import Image

        with Image.open(path) as image:
            return digest_pixels(image)
    return digest_tensors(load_state_dict(path, mmap=True))


def digest_text(text: str) -> str:
    return _digest_bytes(text.encode(errors="surrogatepass"))


def _digest_bytes(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_tensors(tensors: Mapping[str, "Tensor"]) -> str:
    """Return a digest of names, types, shapes and bits."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_pixels(image: "Image.Image") -> str:
    """Return a digest of an image's size and pixels, not of its metadata."""
    return _digest_bytes(f"{image.size} ".encode() + image.convert("RGBA").tobytes())


def digest_scan(content: bytes) -> str:
    """Return a digest of a JPEG's compressed pixels: decoders may differ in the last bit."""
    return _digest_bytes(content[content.find(JPEG_SCAN) :])


def digest_folder(folder: Path) -> str:
    """Return a digest of the names and contents of a folder's files, but for the mark."""
    from library.checkpoints.hashes import digest_of_file  # it imports torch

    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} ".encode(errors="surrogatepass"))
        if path == folder / INDEX:
            fields = parse_json(path.read_text(encoding="utf-8"))
            own = {key: value for key, value in fields.items() if key not in (FOLDER_FIELD, COUNT_FIELD)}
            digest.update(json.dumps(own, sort_keys=True).encode())
        else:
            digest.update(digest_of_file(path).encode())
    return digest.hexdigest()


TRAIN_PY = "# Written by train.py, which replaces it if it runs with the same --name."  # first line of its texts


def seal_text(first_line: str, text: str) -> str:
    """Return a text file of a comment by which its writer is known, with a digest of the text, and the text."""
    return f"{add_digest(first_line, digest_text(text))}\n{text}"


def is_sealed(path: Path, first_line: str) -> bool:
    """Return True if `seal_text` or an earlier version, without a digest, has written this file, and nobody else has
    changed it."""
    with path.open("rb") as file:
        if file.read(len(first_line.encode())) != first_line.encode():
            return False
        file.seek(0)
        line, _, text = file.read().decode("utf-8", "surrogateescape").partition("\n")
    mark, digest = split_mark(line.rstrip("\r"))
    return mark == first_line and digest in (None, digest_text(text))


def seal_page(page: str) -> str:
    """Return a web page with a comment behind it that holds a digest of the page."""
    return f"{page}<!-- #{digest_text(page)} -->\n"


def is_sealed_page(path: Path) -> bool:
    """Return True if nobody has changed a page since `seal_page`; also for a page without a digest."""
    content = path.read_bytes()
    start = content.rfind(SEAL_START)
    page, seal = content[:start], content[start:]
    return start < 0 or seal.strip() == f"<!-- #{_digest_bytes(page)} -->".encode()


def _read_folder_mark(folder: Path) -> str | None:
    fields = parse_json((folder / INDEX).read_text(encoding="utf-8"))
    # A file that was added since would be lost with the folder.
    is_whole = COUNT_FIELD not in fields or fields[COUNT_FIELD] == count_files(folder)
    return str(fields[FOLDER_FIELD]) if is_whole else None


def _read_file_mark(path: Path) -> str | None:
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

    with atomic_path(path) as temporary:
        if path.suffix.lower() in (".jpg", ".jpeg"):
            buffer, unknown = BytesIO(), add_digest(mark, 32 * "0").encode()
            image.save(buffer, format="JPEG", quality=JPEG_QUALITY, comment=unknown)
            content = buffer.getvalue()
            temporary.write_bytes(content.replace(unknown, add_digest(mark, digest_scan(content)).encode(), 1))
            return
        info = PngInfo()
        # Texts may be in any language, and PNG's tEXt chunk holds Latin-1 only.
        for name, text in {**(texts or {}), MARK_FIELD: add_digest(mark, digest_pixels(image))}.items():
            info.add_itxt(name, text)
        image.save(temporary, format="PNG", pnginfo=info)


def mark_folder(folder: Path, mark: str, counts_files: bool = True) -> None:
    """Add the mark to a complete diffusers folder's model_index.json; a folder without one stays unmarked.

    With `counts_files` the mark is void once the folder has another number of files, or one has changed.
    """
    path = folder / INDEX
    if not path.is_file():
        return
    fields = parse_json(path.read_text(encoding="utf-8"))
    content = {**fields, FOLDER_FIELD: mark}
    if counts_files:
        content |= {FOLDER_FIELD: add_digest(mark, digest_folder(folder)), COUNT_FIELD: count_files(folder)}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def count_files(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))
