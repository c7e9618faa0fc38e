"""Files whose place takes none: written under another name, in the folder above, or among temporary files.

A run may be worth days; its weights must not be lost to a full disk or a file that somebody holds open.
"""

import errno
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

from library.errors import UserError

logger = logging.getLogger(__name__)

WRITE_ERRORS = (OSError, SafetensorError)  # the safetensors library has an error of its own, also for a full disk


class NotWrittenError(OSError, UserError):
    """No place takes the file; the message names those that were tried."""


def write_somewhere(path: Path, ending: str, num_bytes: int, write: Callable[[Path], None]) -> Path:
    """Have `write` put a file or folder of about `num_bytes` at `path`, or at the first other place that takes it.

    Gives where it is; another place is told in the log. `ending` is what a name must keep, such as `.safetensors`.
    Raises NotWrittenError.
    """
    failures: list[str] = []
    for place in places(path, ending):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            free = free_bytes(place.parent)
            if free is not None and free < num_bytes:
                raise OSError(errno.ENOSPC, f"{free:,} bytes are free on the disk, about {num_bytes:,} are needed")
            write(place)
        except WRITE_ERRORS as error:
            failures.append(f"{place} ({error})")
            logger.debug("%s cannot be written:", place, exc_info=error)
            continue
        if failures:
            logger.error("%s cannot be written; it is saved as %s", failures[0], place)
        return place
    raise NotWrittenError(f"{path} cannot be written anywhere: {'; '.join(failures)}")


def places(path: Path, ending: str) -> Iterator[Path]:
    """Yield the path, then others; no other one replaces anything."""
    yield path
    name = f"{path.name.removesuffix(ending)}-rescued"
    for folder in (path.parent, path.absolute().parent.parent, Path(tempfile.gettempdir())):
        numbers = iter(range(2, 10_000))
        place = folder / f"{name}{ending}"
        while os.path.lexists(place):
            place = folder / f"{name}-{next(numbers)}{ending}"
        yield place


def free_bytes(folder: Path) -> int | None:
    """Bytes that may still be written to the disk of a folder that is there; None where the system does not say."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None  # some network drives report nothing at all
