"""Writes files whose location fails to another one: a new name, the parent folder, or the temporary folder.

A run may be worth days; a full disk or a locked file must not lose its weights.
"""

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from library.base.errors import UserError
from library.checkpoints.overwriting import alternative_names

logger = logging.getLogger(__name__)

WRITE_ERRORS = (OSError, SafetensorError)  # safetensors raises its own error, also for a full disk


class NotWrittenError(UserError, OSError):
    """No location can take the file; the message names those that were tried."""


def write_somewhere(path: Path, ending: str, num_bytes: int, write: Callable[[Path], None]) -> Path:
    """Call `write` for `path`, or for the first other location that can take a file or folder of about `num_bytes`.

    Return the location and log it if it is not `path`. Names keep `ending`, such as `.safetensors`. Raises
    NotWrittenError.
    """
    failures: list[str] = []
    for location in places(path, ending):
        try:
            location.parent.mkdir(parents=True, exist_ok=True)
            free = free_bytes(location.parent)
            if free is not None and free < num_bytes:
                raise OSError(errno.ENOSPC, f"{free:,} bytes are free on the disk, about {num_bytes:,} are needed")
            write(location)
        except WRITE_ERRORS as error:
            failures.append(f"{location} ({error})")
            logger.debug("%s cannot be written:", location, exc_info=error)
            continue
        if failures:
            logger.error("%s cannot be written; it is saved as %s", failures[0], location)
        return location
    raise NotWrittenError(f"{path} cannot be written anywhere: {'; '.join(failures)}")


def places(path: Path, ending: str) -> Iterator[Path]:
    """Yield `path`, then other locations at which nothing exists."""
    yield path
    for folder in (path.parent, path.absolute().parent.parent, Path(tempfile.gettempdir())):
        # `exists` would take a broken link for a free name.
        yield next(place for place in alternative_names(path, ending, folder) if not os.path.lexists(place))


def free_bytes(folder: Path) -> int | None:
    """Return the free bytes of an existing folder's disk; None if the system does not report them."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None  # some network drives report 0
