"""Temporary folders of a run's processes, deleted when their process ends, or by a later run if it was killed."""

import atexit
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args

import psutil

Kind = Literal["latents", "texts", "weights", "verify", "sweep"]
NAME = re.compile(rf"(?:{'|'.join(get_args(Kind))})-(?P<process>\d+)-\w{{8}}")


def make_temporary_folder(kind: Kind, parent: str | None = None) -> str:
    """Create a folder named after this process in `parent` (default: the system's temporary folder) and lock it."""
    folder = tempfile.mkdtemp(prefix=f"{kind}-{os.getpid()}-", dir=parent)
    with suppress(OSError):  # some file systems do not support locks
        lock(folder)  # held until this process ends
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def delete_abandoned_folders(parents: Iterable[str | Path]) -> None:
    """Delete the temporary folders in `parents` whose processes have ended."""
    for parent in {Path(parent).resolve() for parent in parents if Path(parent).is_dir()}:
        for folder in parent.iterdir():
            match = NAME.fullmatch(folder.name)
            if match and not psutil.pid_exists(int(match["process"])):
                with suppress(OSError):  # locked, already gone, or not ours
                    descriptor = lock(folder)
                    shutil.rmtree(folder, ignore_errors=True)
                    if descriptor is not None:
                        os.close(descriptor)


def lock(folder: str | Path) -> int | None:
    """Lock a folder and return its file descriptor; None on Windows. Raises OSError if another process holds the
    lock."""
    # Containers may share /tmp and /dev/shm without seeing each other's process IDs, but all of them see the locks.
    if sys.platform == "win32":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
