"""Atomic writing of whole folders."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from library.base.atomic_files import flush_folder, full_disk_named

LONGEST_ON_WINDOWS = 259  # characters of a path, without long path support
UNFINISHED, REPLACED = "unfinished", "replaced"
ADDED_TO_NAMES = len(f"..{'0' * 12}.{UNFINISHED}")  # characters added to the name while the folder is being filled
MOVED = re.compile(rf"\.(.+)\.[0-9a-f]{{12}}\.({UNFINISHED}|{REPLACED})")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder next to `path` for filling; it replaces `path` if the block succeeds.

    If the block fails, the temporary folder is removed and an existing folder at `path` is kept. `tidy` cleans up after
    a process that was killed in between.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid4().hex[:12]
    temporary = path.parent / f".{path.name}.{mark}.{UNFINISHED}"
    replaced = path.parent / f".{path.name}.{mark}.{REPLACED}"
    try:
        temporary.mkdir()
        with full_disk_named(path):
            yield temporary
        flush_folder(temporary)
        # A rename cannot replace a folder that has content.
        if path.exists():
            os.rename(path, replaced)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():
            os.rename(replaced, path)
        raise
    flush_folder(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder so that a partly deleted one is never taken for complete."""
    renamed = path.parent / f".{path.name}.{uuid4().hex[:12]}.{UNFINISHED}"
    os.rename(path, renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def tidy(parent: Path, is_wanted: Callable[[str], bool]) -> None:
    """Clean up after a process that was killed while writing folders, for the names that `is_wanted` accepts."""
    # Unfinished folders are deleted. A folder that was moved away, but has no successor yet, is restored.
    for entry in sorted(parent.iterdir()) if parent.is_dir() else ():
        match = MOVED.fullmatch(entry.name)
        if match is None or not is_wanted(match[1]):
            continue
        path = parent / match[1]
        if match[2] == REPLACED and not path.exists():
            os.rename(entry, path)
        else:
            shutil.rmtree(entry, ignore_errors=True)
