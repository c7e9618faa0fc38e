"""A place where images come from: one file in library/data/sources, named after its key in a dataset file."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from library.data.description.schema import SubsetConfig
from library.data.scanned.subsets import ScannedSubset
from library.data.sources.storage.storage import Storage


@dataclass(frozen=True)
class Source:
    """A source of images, defined as SOURCE by its file."""

    keys: tuple[str, ...]  # of a subset, that this source has a use for and not every source has
    scan: Callable[[SubsetConfig, Storage, int], ScannedSubset]
    """List the images with captions and sizes, by so many threads; those in larger files say how they are read."""


def load_source(key: str) -> Source:
    """Import the source that a dataset file calls `key`."""
    found: Source = importlib.import_module(f"library.data.sources.{key}").SOURCE
    return found
