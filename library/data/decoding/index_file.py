"""The index files of images and caches: written whole, and rebuilt if they are missing or damaged.

An index spares reading files again. Without one, or in a folder that cannot be written, a run only takes more time.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from library.base.atomic_files import atomic_path
from library.data.decoding.npz import DAMAGE, open_npz

logger = logging.getLogger(__name__)

Content = TypeVar("Content")


def read_index_file(path: Path, read: Callable[[Path], Content]) -> Content | None:
    """Return what `read` makes of an index; None if there is none, and with a warning if it raises for damage."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except DAMAGE as error:
        logger.warning("%s cannot be used and is rebuilt: %s", path, error)
        return None


def read_arrays(path: Path, read: Callable[[Mapping[str, Any]], Content]) -> Content | None:
    """Return what `read` makes of the arrays of an index, as `read_index_file` does."""

    def read_archive(path: Path) -> Content:
        with open_npz(path) as archive:
            return read(archive)

    return read_index_file(path, read_archive)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> bool:
    """Write an index of arrays atomically. Return False if its folder cannot be written or created."""
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        logger.debug("the index %s is not written: %s", path, error)
        return False
    return True


def pack_names(names: Sequence[str]) -> NDArray[np.uint8]:
    """Return file names as bytes, separated by NUL, which no name contains."""
    return np.frombuffer(os.fsencode("\0".join(names)), dtype=np.uint8)


def unpack_names(packed: NDArray[np.uint8]) -> list[str]:
    """Return the names of `pack_names`."""
    return os.fsdecode(packed.tobytes()).split("\0") if len(packed) else []
