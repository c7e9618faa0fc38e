"""A lock per output name, so that two runs never write the same files.

It is a lock of the operating system on a hidden file in the output folder: it is released when the process dies, and
data loader processes do not inherit it.
"""

import errno
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from library.base.atomic_files import full_disk_named
from library.base.errors import UserError, about
from library.base.json_text import parse_json
from library.base.launcher import launched_rank
from library.checkpoints.overwriting import known_by_start, open_lock_file
from library.options.output.saving import SavingOptions

logger = logging.getLogger(__name__)

LOCKED_ERRORS = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)  # held by another process
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)  # by the file system
LOCK = known_by_start("a lock file of a run", lambda start: start.startswith(b'{"host": '))
WRITES = "another run is writing files of this name"
WAIT = "wait until it ends, stop it, or use another {} or --output_dir"
FAR_BYTE = 1 << 30  # Windows forbids reading locked bytes, so the lock lies behind the text


class Locked(UserError):
    """Another process holds the lock."""


@contextmanager
def run_lock(saving: SavingOptions, flag: str = "--output_name") -> Iterator[None]:
    """Hold the lock of an output folder and name inside the block, in the main process.

    `flag` is the option of the name, for messages. Raises UserError naming the process and host that hold it, or the
    folder if it cannot be written.
    """
    if not saving.output_dir or launched_rank() != 0:
        yield
        return
    path = lock_path(Path(saving.output_dir), saving.output_name)
    is_new_folder = not path.parent.exists()
    file = None
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = acquire(path, advice=WAIT.format(flag))
        except OSError as error:
            raise unwritable("--output_dir", path.parent, error) from error
        yield
    finally:
        if file is not None:
            release(file, path)
        # A run that ends before it has written anything leaves no empty folder.
        if is_new_folder:
            with suppress(OSError):  # the folder is not empty
                path.parent.rmdir()


def unwritable(flag: str, folder: Path, error: OSError) -> UserError:
    """Return the error of a folder in which the system refuses to write."""
    reason = f"cannot be written: {error.strerror}; make room there, change its permissions, or name another folder"
    return about(flag, folder, cause="unreadable")(reason)


def lock_path(folder: Path, output_name: str | None) -> Path:
    """Return the hidden file that is locked for a run."""
    target = folder / (output_name or "last")
    return target.with_name(f".{target.name}.lock")


def acquire(path: Path, what: str = WRITES, advice: str = WAIT.format("--output_name")) -> IO[str] | None:
    """Return the locked file with this process's name in it; None, with a warning, if the file system has no locks.

    If its holder has just deleted the file, lock a new one. Raises Locked if another process holds it: `what` it does,
    and the `advice`.
    """
    while True:
        file = open_lock_file(path, LOCK)
        try:
            lock(file)
        except OSError as error:
            holder = read_holder(file)
            file.close()
            if error.errno in UNSUPPORTED:
                path.unlink(missing_ok=True)
                logger.warning("%s: this file system has no locks; make sure that no second run writes there", path)
                return None
            if error.errno not in LOCKED_ERRORS:
                raise
            raise Locked(
                f"{what} ({holder}, according to {path}); {advice}", path=path, cause="would be lost"
            ) from None
        if is_at(file, path):
            break
        file.close()
    # Another run that is refused reads this to name the process that it has to wait for.
    owner = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        with full_disk_named(path):
            file.seek(0)
            file.truncate()
            file.write(json.dumps(owner))
            file.flush()
    except OSError:
        release(file, path)
        raise
    return file


def release(file: IO[str], path: Path) -> None:
    """Release the lock and delete its file, in the order that the system allows."""
    # Windows deletes no open file. Elsewhere the file goes first, so that no other run locks one that is about to go.
    if sys.platform == "win32":
        with suppress(OSError):
            file.close()
    with suppress(OSError):  # on Windows another run may have it open
        path.unlink()
    with suppress(OSError):  # a full disk, which refuses what is not written yet
        file.close()


def lock(file: IO[str]) -> None:
    """Lock a file without waiting. Raises OSError if another process holds the lock, or if locks are unsupported."""
    if sys.platform == "win32":
        import msvcrt

        file.seek(FAR_BYTE)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        return
    import fcntl

    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which forked children would keep


def read_holder(file: IO[str]) -> str:
    """Describe the process whose name is in the file."""
    file.seek(0)
    try:
        owner = parse_json(file.read())
        return f"process {owner['process']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "it has not said which yet"


def is_at(file: IO[str], path: Path) -> bool:
    """Return True if the open file is still the one at the path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
