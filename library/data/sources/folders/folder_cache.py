"""metadata_cache.json: captions and sizes of a folder, so that a slow disk is not read again (cache_info).

The file is sd-scripts' own, `{path: {"caption": str, "resolution": [w, h]}}`, with an additional field for the files of
each entry. Entries without it, or whose image or caption file has changed, are read again.
"""

import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from library.checkpoints.files import atomic_path
from library.data.description.buckets import Size
from library.data.description.schema import SubsetConfig

logger = logging.getLogger(__name__)

Fingerprint = list[int]  # bytes, nanoseconds of the last change
CacheRow = tuple[str, str, Size | str, Fingerprint, Fingerprint | None]
"""(Path, caption, size or the reason why there is none, fingerprints of image and caption file)."""
FILE_NAME = "metadata_cache.json"


def fingerprint(path: str) -> Fingerprint:
    """Return values that change when a file is written."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


@dataclass(frozen=True)
class FolderCache:
    """The cache file of one image folder."""

    path: Path
    entries: dict[str, Any]
    is_multiline: bool

    @classmethod
    def open(cls, config: SubsetConfig) -> "FolderCache":
        """Read the cache of a folder; empty if there is no file or it is damaged."""
        path = Path(config.image_dir or "") / FILE_NAME
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            entries = {}
        except (OSError, ValueError, RecursionError) as error:
            logger.warning("%s cannot be read and is rebuilt: %s", path, error)
            entries = {}
        return cls(path, entries if isinstance(entries, dict) else {}, config.captions.enable_wildcard)

    def lookup(
        self, image: str, image_print: Fingerprint, caption_print: Fingerprint | None
    ) -> tuple[str, Size] | None:
        """Return (caption, size) if both files are unchanged since the entry was written."""
        entry = self.entries.get(image)
        if not isinstance(entry, dict) or entry.get("read_from") != self._source(image_print, caption_print):
            return None
        try:
            width, height = entry["resolution"]
            return str(entry["caption"]), (int(width), int(height))
        except (KeyError, TypeError, ValueError):
            return None

    def write(self, found: Iterable[CacheRow]) -> None:
        """Write what was read, if anything is new; warn if the folder cannot be written."""
        entries = {
            path: {
                "caption": caption,
                "resolution": list(size),
                "read_from": self._source(image_print, caption_print),
            }
            for path, caption, size, image_print, caption_print in found
        }
        if entries == self.entries:
            return
        try:
            with atomic_path(self.path) as temporary:
                temporary.write_text(json.dumps(entries, indent=2), encoding="utf-8")
        except OSError as error:
            logger.warning("%s cannot be written: %s", self.path, error.strerror)

    def _source(self, image_print: Fingerprint, caption_print: Fingerprint | None) -> dict[str, Any]:
        """Return what an entry was read from."""
        return {"picture": image_print, "caption": caption_print, "is_multiline": self.is_multiline}
