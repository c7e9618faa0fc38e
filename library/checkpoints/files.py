"""Reading and writing of weight files: headers are checked, writes are atomic."""

import errno
import logging
import os
import re
import shutil
import stat
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor

from library.base.errors import UserError
from library.base.json_text import parse_json
from library.checkpoints.marks import MARK_FIELD, add_digest, digest_tensors

logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 100_000_000  # limit of the safetensors format
LENGTH_BYTES = 8
MAX_DIMENSIONS = 64  # limit of a tensor in torch
SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
WEIGHT_SUFFIXES = (*SAFETENSORS_SUFFIXES, ".ckpt", ".pt", ".pth", ".bin")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02")  # torch's zip archives, and files by torch before 1.6
FULL_BYTES = 1 << 20  # a disk with less free space counts as full
PEFT_STEM = "adapter_model"  # of the weight file that PEFT saves in a folder
OBJECT_IN_PICKLE = re.compile(r"GLOBAL ([\w.]+)")  # in torch's message about an object that it refuses to load
TEMPORARY = re.compile(r"\.(?P<stem>.+)\.[0-9a-f]{12}")  # stem of an incomplete `atomic_path` file

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    **({"F8_E8M0": torch.float8_e8m0fnu} if hasattr(torch, "float8_e8m0fnu") else {}),  # since torch 2.7
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """The location of one tensor in a safetensors file. Offsets are bytes from the start of the data."""

    dtype: torch.dtype
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


def load_state_dict(path: str | Path, device: str | torch.device = "cpu", mmap: bool = False) -> dict[str, Tensor]:
    """Load all tensors of a safetensors or pickled file (.ckpt, .pt, .pth, .bin), by name.

    The content determines the format, see `holds_safetensors`. `mmap` leaves the values of a pickled file on disk until
    they are used, if its format allows it (torch >= 1.6). Pickled files are read with weights_only=True, so no code in
    them is executed; the dictionary `state_dict` that training programs write is unwrapped. Raises UserError for a
    missing or damaged file.
    """
    path = Path(path)
    if not path.is_file():
        if not path.exists():
            raise UserError.of_file(path, "does not exist", cause="missing")
        raise UserError.of_file(path, "is a folder, not a weight file")
    require_weight_file(path)
    if holds_safetensors(path):
        from safetensors.torch import load_file

        read_header(path)  # raises the clearer errors for a damaged file
        return dict(load_file(path, str(device)))
    content = load_pickle(path, device, mmap)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise UserError.of_file(path, f"contains a {type(content).__name__}, not a dictionary of tensors")
    tensors = {str(name): to_tensor(str(name), value) for name, value in content.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def load_pickle(path: Path, device: str | torch.device = "cpu", mmap: bool = False) -> Any:
    """Load the tensors, numbers and strings of a pickled file without executing code.

    Raises UserError for a damaged file and for one with other objects.
    """
    uses_mmap = mmap and is_zipfile(path) and not is_safetensors(path)  # given a path, torch.load goes by its extension
    try:
        with path.open("rb") as file:
            return torch.load(path if uses_mmap else file, map_location=device, weights_only=True, mmap=uses_mmap)
    except Exception as error:  # unpickling a damaged file can raise anything
        foreign_object = OBJECT_IN_PICKLE.search(str(error))
        if foreign_object or type(error).__name__ == "UnpicklingError":
            object_name = f" ({foreign_object[1]})" if foreign_object else ""
            raise UserError.of_file(
                path,
                f"cannot be read as a file of plain tensors: it contains other Python objects{object_name}, which are "
                "not loaded, because that could run code; convert it to .safetensors with a program you trust",
                cause="unreadable",
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0][:200]
        raise UserError.of_file(
            path,
            f"cannot be read as a file of plain tensors: it is truncated or damaged ({reason}); download or "
            "copy it again",
            cause="unreadable",
        ) from error


def to_tensor(name: str, value: Any) -> Tensor | None:
    """Convert a value of a pickled dictionary to a tensor; return None unless it is a weight or an alpha.

    Alphas may be plain numbers; dropping them would change the adapter's strength.
    """
    is_alpha = name.endswith(".alpha") and isinstance(value, int | float)
    # On the CPU even where a caller has made another device the default: networks are first tried on the meta device.
    return torch.tensor(float(value), device="cpu") if is_alpha else value if isinstance(value, Tensor) else None


def file_in_folder(path: Path, where: str) -> Path:
    """Return the weight file in a folder saved by PEFT; return other paths unchanged.

    Raises UserError naming `where` for any other folder.
    """
    if not path.is_dir():
        return path
    weight_file = next(
        (file for suffix in ("safetensors", "bin") if (file := path / f"{PEFT_STEM}.{suffix}").is_file()), None
    )
    if weight_file is None:
        raise UserError(
            f"{where} is a folder without {PEFT_STEM}.safetensors, which PEFT saves; use an adapter file", path=path
        )
    return weight_file


def display_path(path: Path) -> Path:
    """Return the path to show for an adapter file: the folder if PEFT saved it, because all its files have one name."""
    return path.parent if path.stem == PEFT_STEM and path.parent.name else path


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
        raise UserError.of_file(path, "is empty; download or copy it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError.of_file(path, "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise UserError.of_file(path, "is a web page, not a checkpoint: download the file itself")
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        raise UserError.of_file(
            path, f"is a text file, not a checkpoint; it begins with {start[:40].decode('ascii')!r}"
        )
    is_named = path.suffix.lower() in WEIGHT_SUFFIXES
    if not (is_named or holds_safetensors(path) or start.startswith(PICKLE_STARTS)):
        raise UserError.of_file(
            path,
            f"is not a checkpoint: it contains neither safetensors nor a PyTorch pickle (it begins with "
            f"{start[:8]!r}); other formats, such as GGUF, are not supported",
        )


@contextmanager
def full_disk_named(path: str | Path) -> Iterator[None]:
    """Convert the various errors that writers raise on a full disk into one OSError (ENOSPC) that names `path`."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, RuntimeError, shutil.Error) as error:
        # torch's own message is "unexpected pos 64 vs 0", so the free space has to tell whether the disk is the cause.
        if "No space left" in str(error) or shutil.disk_usage(Path(path).parent).free < FULL_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path` for writing; it replaces `path` if the block succeeds.

    If the block fails, the temporary file is removed and an existing file at `path` is kept. The temporary name keeps
    the extension, because writers choose the format by it. Missing parent folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.stem[:100]}.{uuid4().hex[:12]}{path.suffix}"
    try:
        temporary.touch(exist_ok=False)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        with full_disk_named(path):
            yield temporary
        temporary.chmod(mode)  # some writers restrict the permissions
        # Before the rename: otherwise a power cut can leave the new name with an empty file.
        _flush_to_disk(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def copy_atomically(source: Path, path: Path) -> None:
    """Copy a file; `path` is replaced whole or not at all. Missing parent folders are created."""
    with atomic_path(path) as temporary:
        shutil.copyfile(source, temporary)


def remove_temporary(folder: Path, is_wanted: Callable[[str], bool]) -> None:
    """Remove the temporary files of a process killed inside `atomic_path`, if `is_wanted` accepts their stem.

    Call this only while no other process writes such files.
    """
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        stem = entry.stem
        while match := TEMPORARY.fullmatch(stem):  # nested atomic writers leave nested names
            stem = match["stem"]
        if stem != entry.stem and entry.is_file() and is_wanted(stem):
            entry.unlink()


def save_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    mark: str | None = None,
) -> None:
    """Write tensors, metadata and the command's mark to a safetensors file, atomically."""
    from safetensors.torch import save_file

    fields = {k: v for k, v in (metadata or {}).items() if k != MARK_FIELD}  # metadata may be those of another file
    fields |= {} if mark is None else {MARK_FIELD: add_digest(mark, digest_tensors(tensors))}
    with atomic_path(path) as temporary:
        # safetensors refuses views that are not contiguous.
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, fields or None)


def save_pickle_state_dict(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    counts: Mapping[str, int] | None = None,
    mark: str | None = None,
) -> None:
    """Write a .ckpt or .pt file for `torch.load(weights_only=True)`, atomically and without metadata.

    With `counts`, such as epochs, the tensors are stored in a dictionary `state_dict` next to them, as training
    programs do.
    """
    with atomic_path(path) as temporary:
        torch.save(dict(tensors) if counts is None else {"state_dict": dict(tensors), **counts}, temporary)
        if mark is not None:
            mark_pickle(temporary, mark)


def mark_pickle(path: Path, mark: str) -> None:
    """Store the mark and a digest of the tensors as the comment of torch's zip archive, which readers ignore; other
    formats stay unmarked."""
    if is_zipfile(path):
        content = add_digest(mark, digest_tensors(load_state_dict(path, mmap=True)))
        with ZipFile(path, "a") as archive:
            archive.comment = content.encode()


def _broken(path: Path, problem: str) -> UserError:
    return UserError.of_file(path, f"is not a complete safetensors file: {problem}. Download or copy it again")


def _entry(path: Path, name: str, fields: Any) -> TensorEntry:
    try:
        dtype_name, shape, (start, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise _broken(path, f"the header's entry for {name!r} lacks dtype, shape or data_offsets") from error
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise UserError.of_file(
            path, f": {name!r} has the type {dtype_name}, which is not supported; known: {', '.join(DTYPES)}"
        )
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)) or len(shape) > MAX_DIMENSIONS:
        raise _broken(path, f"{name!r} has the shape {str(shape)[:80]} and the offsets {start} to {end}")
    return TensorEntry(DTYPES[dtype_name], shape, start, end)


def _check_offsets(path: Path, tensors: Mapping[str, TensorEntry], data_bytes: int) -> None:
    """Raise UserError unless every tensor has the length of its shape, and the tensors fill the data without gaps."""
    # The format forbids gaps, so that a file cannot hide other content between its tensors.
    position, previous = 0, "the header"
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        num_bytes = entry.dtype.itemsize
        for n in entry.shape:
            num_bytes *= n
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


def _flush_to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Flush a folder, so that a rename in it survives a power cut; Windows has no such call and needs none."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        logger.debug("%s: this file system cannot flush folders", folder)
    finally:
        os.close(handle)
