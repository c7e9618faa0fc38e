"""Headers of weight files, read without torch: what a file is, and names, shapes and metadata of its tensors."""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from library.base.errors import UserError, of_file
from library.base.json_text import parse_json

MAX_HEADER_BYTES = 100_000_000  # limit of the safetensors format
LENGTH_BYTES = 8
MAX_DIMENSIONS = 64  # limit of a tensor in torch
SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
WEIGHT_SUFFIXES = (*SAFETENSORS_SUFFIXES, ".ckpt", ".pt", ".pth", ".bin")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02")  # torch's zip archives, and files by torch before 1.6
BYTES_BY_DTYPE = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1},
    **{"F8_E5M2FNUZ": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1},
    **{"BOOL": 1, "C64": 8},
}


@dataclass(frozen=True)
class TensorEntry:
    """The location of one tensor in a safetensors file. Offsets are bytes from the start of the data."""

    dtype: str  # a key of BYTES_BY_DTYPE
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    num_bytes: int  # length of the JSON text; the data starts LENGTH_BYTES after it


def read_header(path: str | Path) -> Header:
    """Read names, shapes, dtypes and metadata of a safetensors file, but not its data.

    Raises UserError naming the file and the problem if the file is truncated or invalid.
    """
    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < LENGTH_BYTES:
            raise _broken(path, f"it has only {size} bytes")
        (num_bytes,) = struct.unpack("<Q", file.read(LENGTH_BYTES))
        if num_bytes > MAX_HEADER_BYTES:
            raise _broken(path, f"its header would be {num_bytes} bytes long; the format allows {MAX_HEADER_BYTES}")
        if LENGTH_BYTES + num_bytes > size:
            raise _broken(path, f"it is truncated: {size - LENGTH_BYTES} of {num_bytes} header bytes exist")
        text = file.read(num_bytes)
    try:
        fields = parse_json(text)
    except ValueError as error:
        raise _broken(path, f"its header is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise _broken(path, "its header is not a JSON object")
    metadata = fields.pop("__metadata__", {})
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(path, "its metadata does not map names to strings")
    tensors = {name: _entry(path, name, entry) for name, entry in fields.items()}
    _check_offsets(path, tensors, size - LENGTH_BYTES - num_bytes)
    return Header(tensors, metadata, num_bytes)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata of a safetensors file; empty for other file types, which have none."""
    return dict(read_header(path).metadata) if holds_safetensors(path) else {}


def is_safetensors(path: str | Path) -> bool:
    """Return True if the extension says that a file is to be written as safetensors; others are pickled."""
    return Path(path).suffix.lower() in SAFETENSORS_SUFFIXES


def holds_safetensors(path: str | Path) -> bool:
    """Return True if an existing file is to be read as safetensors, judged by its content.

    The extension decides only if the file starts like neither format, so that errors about a damaged file name the
    intended format.
    """
    with Path(path).open("rb") as file:
        start = file.read(LENGTH_BYTES + 1)
    # Tested before the pickle marks, because the length of a header of 640 bytes is stored as 80 02, as a pickle
    # begins.
    if len(start) > LENGTH_BYTES and start[LENGTH_BYTES:] == b"{":
        (num_bytes,) = struct.unpack("<Q", start[:LENGTH_BYTES])
        if num_bytes <= MAX_HEADER_BYTES:  # pickles, whose first bytes read as a length, are far above it
            return True
    return is_safetensors(path) and not start.startswith(PICKLE_STARTS)


def require_weight_file(path: Path) -> None:
    """Raise UserError for what failed downloads leave in place of a checkpoint: web pages, Git LFS pointers, empty
    files."""
    with path.open("rb") as file:
        start = file.read(256)
    if not start:
        raise of_file(path)("is empty", "download or copy it again")
    if start.startswith(b"version https://git-lfs"):
        raise of_file(path)("is a Git LFS pointer, not the file itself", "fetch it with `git lfs pull`")
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise of_file(path)("is a web page, not a checkpoint: download the file itself")
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        raise of_file(path)(f"is a text file, not a checkpoint; it begins with {start[:40].decode('ascii')!r}")
    is_named = path.suffix.lower() in WEIGHT_SUFFIXES
    if not (is_named or holds_safetensors(path) or start.startswith(PICKLE_STARTS)):
        raise of_file(path)(
            f"is not a checkpoint: it contains neither safetensors nor a PyTorch pickle (it begins with "
            f"{start[:8]!r}); other formats, such as GGUF, are not supported"
        )


def _broken(path: Path, problem: str) -> UserError:
    return of_file(path)(f"is not a complete safetensors file: {problem}. Download or copy it again")


def _entry(path: Path, name: str, fields: Any) -> TensorEntry:
    try:
        dtype_name, shape, (start, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(path, f"the header's entry for {name!r} lacks dtype, shape or data_offsets") from error
    if not isinstance(dtype_name, str) or dtype_name not in BYTES_BY_DTYPE:
        raise of_file(path)(
            f": {name!r} has the type {dtype_name}, which is not supported; known: {', '.join(BYTES_BY_DTYPE)}"
        )
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)) or len(shape) > MAX_DIMENSIONS:
        raise _broken(path, f"{name!r} has the shape {str(shape)[:80]} and the offsets {start} to {end}")
    return TensorEntry(dtype_name, shape, start, end)


def _check_offsets(path: Path, tensors: Mapping[str, TensorEntry], data_bytes: int) -> None:
    """Raise UserError unless every tensor has the length of its shape, and the tensors fill the data without gaps."""
    # The format forbids gaps, so that a file cannot hide other content between its tensors.
    position, previous = 0, "the header"
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        num_bytes = BYTES_BY_DTYPE[entry.dtype] * prod(entry.shape)
        if entry.end - entry.start != num_bytes:
            raise _broken(path, f"{name!r} needs {num_bytes} bytes but has the offsets {entry.start} to {entry.end}")
        if entry.start < position:
            raise _broken(path, f"{name!r} overlaps {previous!r}")
        if entry.start > position:
            raise _broken(path, f"there is a gap of {entry.start - position} bytes before {name!r}")
        if entry.end > data_bytes:
            raise _broken(
                path, f"it is truncated: {name!r} ends at byte {entry.end} of the data, but only {data_bytes} exist"
            )
        position, previous = entry.end, name
    if position != data_bytes:
        raise _broken(path, f"{data_bytes - position} bytes follow the last tensor")
