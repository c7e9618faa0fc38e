"""A disk cache of images that were read over the network, limited in size: the least recently used are deleted."""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from library.base.errors import about
from library.data.scanned.names import short_digest

# fsspec's caches cannot replace this one. None has a size limit; filecache and simplecache fetch whole shards.
# blockcache fetches whole blocks and requires file objects that not every file system of fsspec has. Its only JSON file
# contains signed URLs, and the whole cache is unreadable once that file is damaged.

PRUNE_EVERY = 0.05  # share of the size that may be written between two scans of the folder
KEPT_OF_FULL = 0.9  # share of the size that is kept when a scan finds more than fits


@dataclass
class DiskCache:
    """Contents by name, shared by all processes that use the folder. Files are written atomically."""

    folder: str
    max_bytes: int
    num_written: int | None = None  # bytes written by this process since its last scan of the folder; None before it

    def path(self, name: str) -> Path:
        """Return the file that holds the content `name`."""
        digest = short_digest(name)
        return Path(self.folder, digest[:2], digest)

    def get(self, name: str) -> bytes | None:
        """Return the content; None if it is not cached. Marks it as used."""
        path = self.path(name)
        try:
            content = path.read_bytes()
            # The modification time stands for the last use, because many file systems are mounted without access times.
            os.utime(path)
        except OSError:
            return None
        return content

    def put(self, name: str, content: bytes) -> None:
        """Store content, unless it exceeds the size limit. Raises UserError if the folder cannot be written."""
        path = self.path(name)
        if len(content) > self.max_bytes:
            return
        temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise about("--cache_dir")(
                f": {self.folder} cannot be written: {error.strerror}", "use another folder, or free space"
            ) from None
        if self.num_written is None or self.num_written + len(content) > PRUNE_EVERY * self.max_bytes:
            self.prune()
        else:
            self.num_written += len(content)

    def prune(self) -> None:
        """Delete the least recently used files if the cache exceeds its size."""
        self.num_written = 0
        files: list[tuple[float, int, str]] = []
        for entry in (entry for folder in Path(self.folder).glob("??") for entry in os.scandir(folder)):
            try:
                status = entry.stat()
            except FileNotFoundError:  # another process deleted it first
                continue
            files.append((status.st_mtime, status.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        if total <= self.max_bytes:
            return
        for _, size, path in sorted(files):
            if total <= KEPT_OF_FULL * self.max_bytes:
                return
            Path(path).unlink(missing_ok=True)
            total -= size
