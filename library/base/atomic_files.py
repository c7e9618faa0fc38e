"""Files that are written whole or not at all."""

import errno
import logging
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

logger = logging.getLogger(__name__)

FULL_BYTES = 1 << 20  # a disk with less free space counts as full
TEMPORARY = re.compile(r"\.(?P<stem>.+)\.[0-9a-f]{12}")  # stem of an incomplete `atomic_path` file


@contextmanager
def full_disk_named(path: str | Path) -> Iterator[None]:
    """Convert the various errors that writers raise on a full disk into one OSError that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # of a write, which knows no name
    except Exception as error:
        # By its name: files are also written by a Python without safetensors.
        if not isinstance(error, RuntimeError | shutil.Error) and type(error).__name__ != "SafetensorError":
            raise
        # torch's own message is "unexpected pos 64 vs 0", so the free space has to tell whether the disk is the cause.
        if "No space left" in str(error) or shutil.disk_usage(Path(path).parent).free < FULL_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
        raise


@contextmanager
def atomic_path(path: str | Path, mode: int = 0o666) -> Iterator[Path]:
    """Yield a temporary path next to `path` for writing; it replaces `path` if the block succeeds.

    If the block fails, the temporary file is removed and an existing file at `path` is kept. The temporary name keeps
    the extension, because writers choose the format by it. Missing parent folders are created. The file never has more
    permissions than `mode`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.stem[:100]}.{uuid4().hex[:12]}{path.suffix}"
    try:
        temporary.touch(mode, exist_ok=False)
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


def write_whole(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a small text file with at most the permissions `mode`."""
    with atomic_path(path, mode) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


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
