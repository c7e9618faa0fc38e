"""A source of images: one file in library/data/sources, named after its key in a dataset file."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from library.data.description.schema import SubsetConfig
from library.data.scanned.subsets import ScannedSubset
from library.data.sources.storage.storage import Storage


@dataclass(frozen=True)
class Source:
    """A source of images, defined as SOURCE by its file."""

    keys: tuple[str, ...]  # of a subset that this source uses and not all sources do
    scan: Callable[[SubsetConfig, Storage, int], ScannedSubset]
    """Lists the images with captions and sizes, using this many threads; sets a reader for images in larger files."""


def load_source(key: str) -> Source:
    """Import the source of a dataset file's key."""
    found: Source = importlib.import_module(f"library.data.sources.{key}").SOURCE
    return found
