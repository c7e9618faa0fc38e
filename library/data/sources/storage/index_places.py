"""Where the index of a folder is: beside the files that it describes, or with the caches."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from library.data.decoding.index_file import read_arrays, write_arrays
from library.data.scanned.names import folder_name

Content = TypeVar("Content")


@dataclass(frozen=True)
class IndexPlaces:
    """The places of the indexes of a subset."""

    cache_dir: str | None = None  # the user's folder of caches: nothing is added beside the files
    spare_dir: str | None = None  # gets the indexes of folders that cannot be written
    are_kept: bool = True  # False: none is written

    def to_write(self, folder: str, name: str) -> list[Path]:
        """Return the paths that an index may be written to: the first that can be is to get it."""
        root = self.spare_dir if self.cache_dir is None else self.cache_dir
        paths = [] if root is None else [Path(root, folder_name(folder), name)]
        if self.cache_dir is None:
            paths.insert(0, Path(folder, name))
        return paths if self.are_kept else []

    def to_read(self, folder: str, name: str) -> list[Path]:
        """Return the paths of the indexes that exist, the newest first. The one beside the files is used until another
        is newer, and stays."""
        found = []
        for path in {Path(folder, name), *replace(self, are_kept=True).to_write(folder, name)}:
            with suppress(OSError):
                found.append((path.stat().st_mtime_ns, path))
        return [path for _, path in sorted(found, reverse=True)]

    def read_arrays(self, folder: str, name: str, read: Callable[[Mapping[str, Any]], Content]) -> Content | None:
        """Return what `read` makes of the newest index that is not damaged; None without one."""
        contents = (read_arrays(path, read) for path in self.to_read(folder, name))
        return next((content for content in contents if content is not None), None)

    def write_arrays(self, folder: str, name: str, arrays: Mapping[str, Any]) -> None:
        """Write an index of arrays, if a place for it can be written."""
        any(write_arrays(path, arrays) for path in self.to_write(folder, name))
