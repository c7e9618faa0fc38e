"""A source of images: one file in library/data/sources, named after its key in a dataset file."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from library.data.description.schema import SubsetConfig
from library.data.scanned.subsets import ScannedSubset
from library.data.sources.storage.storage import Storage


@dataclass(frozen=True)
class Source:
    """A source of images; its file defines one as SOURCE."""

    keys: tuple[str, ...]  # subset keys that only some sources use, this one included
    scan: Callable[[SubsetConfig, Storage, int], ScannedSubset]
    """Lists the images with captions and sizes, given the number of threads. Sets a reader for images in larger
    files."""
    check_packages: Callable[[SubsetConfig], None] = lambda config: None
    """Raises UserError naming what to install if a package is missing that the source needs."""


def load_source(key: str) -> Source:
    """Import the source that a key of a dataset file names."""
    source: Source = importlib.import_module(f"library.data.sources.{key}").SOURCE
    return source
