"""The keys of a dataset file that name a source of images: the names of the files in library/data/sources.

A source is above this layer; it is imported here by its name, to ask which other keys it has a use for.
"""

import importlib
import pkgutil
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "sources"
SOURCES = tuple(sorted(module.name for module in pkgutil.iter_modules([str(FOLDER)]) if not module.ispkg))


def keys_used_by(source: str) -> tuple[str, ...]:
    """Return the keys of a subset that a source has a use for and not every source has."""
    keys: tuple[str, ...] = importlib.import_module(f"library.data.sources.{source}").SOURCE.keys
    return keys
