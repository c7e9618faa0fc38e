"""The archives of a disk cache: reading, writing, errors, and cleaning up after killed processes."""

import io
import math
import os
import re
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from library.base.atomic_files import atomic_path
from library.base.errors import UserError, error_in
from library.checkpoints.folders import LONGEST_ON_WINDOWS
from library.checkpoints.marks import ZIP_START
from library.checkpoints.overwriting import FileKind, read_start

DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
    MemoryError,
    RecursionError,
)
"""The errors that reading a truncated, overwritten or forged archive can raise."""

MISSING, DAMAGED = "missing", "damaged"

MOST_BYTES = 1 << 30  # of all arrays in an archive; our largest, eight captions of T5, have 64 MB
LARGEST_RATIO = 50  # of unpacked to packed bytes in a large archive; latents and text features hardly shrink
# The first form is that of `atomic_path`, the second that of earlier versions.
LEFT_OVER = re.compile(r"\.(.+\.[0-9a-f]{12}\.npz|.+\.npz\.\d+\.tmp)")
DEAD_AFTER_S = 3600.0  # writing takes seconds, and other runs may be writing into the folder


@dataclass(frozen=True)
class CacheWords:
    """The words that describe a cache in messages."""

    name: str
    entries: str  # the counted unit
    content: str
    flag: str  # option that keeps the content in memory; with `_to_disk` on disk
    checking: str  # the task that other processes wait for
    caching: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of checking a cache file."""

    fault: str | None  # the problem, as a continuation of "is"; None if valid
    kept: frozenset[str] = frozenset()  # cached captions that need not be encoded again
    is_foreign: bool = False  # written by another program
    compares_content: bool = False  # sizes and times do not tell that it is stale


class EntryError(UserError):
    """An unusable entry of a file. The message is the reason, as a continuation of "is"."""


def describe_damage(error: BaseException) -> str:
    """Describe the problem of a file, as a continuation of "is"; `error` is one of DAMAGE."""
    if isinstance(error, EntryError):
        return str(error)
    return MISSING if isinstance(error, FileNotFoundError) else DAMAGED


def archive_kind(name: str, is_entry: Callable[[str], bool]) -> FileKind:
    """Return the kind of a cache's archives, by whichever program: with at least one entry that `is_entry` accepts.

    A damaged archive, and a file of zeros as a power cut leaves it, count as the cache's own.
    """

    def is_own(path: Path) -> bool:
        start = read_start(path)
        if not start.startswith(ZIP_START):
            return not start.strip(b"\0")
        try:
            with zipfile.ZipFile(path) as archive:
                return any(is_entry(entry.removesuffix(".npy")) for entry in archive.namelist())
        except DAMAGE:
            return True

    return FileKind(name, is_own)


@contextmanager
def open_to_read(path: str, words: CacheWords) -> Iterator[Mapping[str, Any]]:
    """Open an archive. Raises UserError naming the file if it is missing or damaged, or if the block raises
    EntryError."""
    try:
        with open_npz(path) as archive:
            yield archive
        return
    except DAMAGE as error:
        fault = describe_damage(error)
        reason = f"{fault}: {error}" if fault == DAMAGED else fault
    # The check at the start finds all but two faults: a file that was deleted since, and damage in the middle of one,
    # which it does not read.
    fixes = {MISSING: "run again", DAMAGED: "delete it and run again"}
    fix = fixes.get(fault, "run again without --skip_cache_check")
    raise error_in(path=path)(f"the {words.name} {path} is {reason}; {fix} to rebuild it")


@contextmanager
def open_to_write(path: str, words: CacheWords) -> Iterator[Path]:
    """Yield a temporary file that atomically replaces the one at `path`.

    Raises UserError naming a folder that cannot be written.
    """
    try:
        with atomic_path(path) as temporary:
            yield temporary
    except OSError as error:
        length = len(os.path.abspath(path))
        long = f", its path has {length} characters" if length > LONGEST_ON_WINDOWS else ""
        raise error_in(path=path)(
            f"the {words.name} {path} cannot be written ({error.strerror}{long})",
            f"give a folder for --{words.flag}_to_disk with --cache_dir, or use --{words.flag} to keep "
            f"{words.content} in memory",
        ) from None


@contextmanager
def open_npz(path: str | Path) -> Iterator[Mapping[str, Any]]:
    """Open an archive whose arrays are read when accessed. Raises one of DAMAGE."""
    require_plain_file(path)
    with zipfile.ZipFile(path) as archive:
        require_small(archive)
        yield Arrays(archive)


class Arrays(Mapping[str, Any]):
    """The arrays of an archive by name. Unlike numpy's, they take as much memory as their files, whatever shapes their
    headers state."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self._entries = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> NDArray[Any]:
        with self._archive.open(self._entries[name]) as file:
            content = io.BytesIO(file.read())
        version = npy.read_magic(content)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version} of {name} is unknown")
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, is_fortran, dtype = read_header(content)
        if dtype.hasobject:
            raise ValueError(f"{name} contains Python objects")
        size, data = math.prod(shape) * dtype.itemsize, content.getbuffer()[content.tell() :]
        if min(shape, default=0) < 0 or size != len(data):
            raise ValueError(f"{name} has the shape {str(shape)[:80]} and {len(data)} bytes")
        flat = np.frombuffer(data, dtype) if size else np.empty(0, dtype)
        return flat.reshape(shape, order="F" if is_fortran else "C")


def require_plain_file(path: str | Path) -> None:
    """Raise UserError if the path is a pipe or a device, from which reading would block forever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError("it is not a regular file")


def require_small(archive: zipfile.ZipFile) -> None:
    """Raise UserError if an archive would unpack to more bytes than any cache file holds, or than one of its size."""
    num_bytes = sum(info.file_size for info in archive.infolist())
    packed_bytes = sum(info.compress_size for info in archive.infolist())
    if num_bytes > min(MOST_BYTES, max(MOST_BYTES // 16, LARGEST_RATIO * packed_bytes)):
        raise UserError(f"it would unpack to {num_bytes / 1e9:.1f} GB")


def clear_left_overs(folders: Iterable[str]) -> None:
    """Delete unfinished files of killed processes after an hour."""
    for folder in sorted(set(folders)):
        if not os.path.isdir(folder):
            continue
        for entry in os.scandir(folder):
            if LEFT_OVER.fullmatch(entry.name) and entry.is_file() and is_old(entry):
                try:
                    os.remove(entry.path)
                except OSError:  # another run deleted it, or the folder cannot be written
                    continue


def is_old(entry: "os.DirEntry[str]") -> bool:
    """Return True if no process can still be writing the file."""
    try:
        return time.time() - entry.stat().st_mtime > DEAD_AFTER_S
    except FileNotFoundError:
        return False
