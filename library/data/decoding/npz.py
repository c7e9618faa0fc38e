"""The archives of a cache on disk: what can become of them, and what a killed process leaves of them."""

import os
import re
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from library.checkpoints.files import atomic_path
from library.errors import UserError

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
"""What reading one that was cut, overwritten or made up raises."""

MISSING, DAMAGED = "missing", "damaged"

MOST_BYTES = 1 << 30  # of all arrays in one archive; the largest of ours, eight captions of T5, have 64 MB
LEFT_OVER = re.compile(r"\.(.+\.[0-9a-f]{12}\.npz|.+\.npz\.\d+\.tmp)")
DEAD_AFTER_S = 3600.0  # writing one takes seconds; other runs may be writing into the same folder


@dataclass(frozen=True)
class CacheWords:
    """How messages speak of a cache."""

    name: str
    entries: str  # what is counted
    content: str
    flag: str  # that keeps the content in memory; with `_to_disk` on disk
    checking: str  # what processes wait for
    caching: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether what lies on disk is still true."""

    fault: str | None  # what is wrong, to be read after "is"
    kept: frozenset[str] = frozenset()  # captions of a file that need not be encoded again
    is_foreign: bool = False  # written by another program


class EntryError(UserError):
    """An entry of a file that cannot be used; the message is the reason, to be read after "is"."""


def fault_of(error: BaseException) -> str:
    """What is wrong with a file, to be read after "is"; `error` is one of DAMAGE."""
    if isinstance(error, EntryError):
        return str(error)
    return MISSING if isinstance(error, FileNotFoundError) else DAMAGED


@contextmanager
def reading(path: str, words: CacheWords) -> Iterator[Mapping[str, Any]]:
    """An open archive. Raises UserError naming a file that is missing or damaged, or the EntryError of the block."""
    try:
        with open_npz(path) as archive:
            yield archive
        return
    except DAMAGE as error:
        fault = fault_of(error)
        reason = f"{fault}: {error}" if fault == DAMAGED else fault
    delete = "delete it and " if fault == DAMAGED else ""  # a start does not read all of every file
    raise UserError(
        f"the {words.name} {path} is {reason}; {delete}run again without --skip_cache_check to make it anew"
    )


@contextmanager
def writing(path: str, words: CacheWords) -> Iterator[Path]:
    """A temporary file that becomes the one at `path`, whole or not at all.

    Raises UserError naming a folder that cannot be written.
    """
    try:
        with atomic_path(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(
            f"the {words.name} {path} cannot be written ({error.strerror}); --{words.flag}_to_disk writes beside the "
            f"pictures, --{words.flag} alone keeps {words.content} in memory"
        ) from None


@contextmanager
def open_npz(path: str | Path) -> Iterator[Mapping[str, Any]]:
    """An open archive, whose arrays are read when they are asked for. Raises one of DAMAGE."""
    require_plain_file(path)
    with zipfile.ZipFile(path) as archive:
        require_small(archive)
    with np.load(path, allow_pickle=False) as arrays:
        yield arrays


def require_plain_file(path: str | Path) -> None:
    """Raise UserError for a pipe or a device under the name of a file, from which reading would wait for ever."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError("it is no plain file")


def require_small(archive: zipfile.ZipFile) -> None:
    """Raise UserError for an archive that would unpack to more than any cache holds."""
    num_bytes = sum(info.file_size for info in archive.infolist())
    if num_bytes > MOST_BYTES:
        raise UserError(f"it would unpack to {num_bytes / 1e9:.1f} GB")


def clear_left_overs(folders: Iterable[str]) -> None:
    """Delete what processes that were killed had not finished writing, once it is surely of a dead one."""
    for folder in sorted(set(folders)):
        if not os.path.isdir(folder):
            continue
        for entry in os.scandir(folder):
            if LEFT_OVER.fullmatch(entry.name) and entry.is_file() and is_old(entry):
                try:
                    os.remove(entry.path)
                except OSError:  # another run cleared it up, or the folder cannot be written
                    continue


def is_old(entry: "os.DirEntry[str]") -> bool:
    """Whether nobody can still be writing a file."""
    try:
        return time.time() - entry.stat().st_mtime > DEAD_AFTER_S
    except FileNotFoundError:
        return False
