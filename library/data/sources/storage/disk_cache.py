"""A disk cache of images read over the network, limited in size; the least recently used are deleted first."""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from library.data.scanned.names import short_digest
from library.errors import UserError

# fsspec's caches do not replace this one. None has a size limit; filecache and simplecache fetch whole shards.
# blockcache fetches whole blocks and needs file objects that not every file system of fsspec has; its one JSON file
# holds signed URLs, and nothing in the cache can be read once that file is damaged.

PRUNE_EVERY = 0.05  # of the size: written between two scans of the folder
KEPT_OF_FULL = 0.9  # of the size: kept when a scan finds more than fits


@dataclass
class DiskCache:
    """Contents by name, shared by all processes that use the folder. A file exists whole or not at all."""

    folder: str
    max_bytes: int
    num_written: int | None = None  # bytes by this process since its last scan of the folder; None before the first

    def path(self, name: str) -> Path:
        """Return the file of a content."""
        digest = short_digest(name)
        return Path(self.folder, digest[:2], digest)

    def get(self, name: str) -> bytes | None:
        """Return the content; None if it is not cached."""
        path = self.path(name)
        try:
            content = path.read_bytes()
            os.utime(path)  # mark as used
        except OSError:
            return None
        return content

    def put(self, name: str, content: bytes) -> None:
        """Store a content. Raises UserError if the folder cannot be written."""
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
            raise UserError(
                f"--cache_dir: {self.folder} cannot be written: {error.strerror}; use another folder, or free space"
            ) from None
        if self.num_written is None or self.num_written + len(content) > PRUNE_EVERY * self.max_bytes:
            self.prune()
        else:
            self.num_written += len(content)

    def prune(self) -> None:
        """Delete the least recently used files, if there is more than fits."""
        self.num_written = 0
        found: list[tuple[float, int, str]] = []
        for entry in (entry for folder in Path(self.folder).glob("??") for entry in os.scandir(folder)):
            try:
                status = entry.stat()
            except FileNotFoundError:  # another process deleted it first
                continue
            found.append((status.st_mtime, status.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        if total <= self.max_bytes:
            return
        for _, size, path in sorted(found):
            if total <= KEPT_OF_FULL * self.max_bytes:
                return
            Path(path).unlink(missing_ok=True)
            total -= size
