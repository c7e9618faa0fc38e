"""The keys of a dataset file that name a source of images: the names of the files in library/data/sources.

Sources belong to a higher layer, so a source is imported by name here, to look up the keys it uses.
"""

import importlib
import pkgutil
from pathlib import Path

HUB_SOURCE = "dataset_name"
COMMIT = r"[0-9a-f]{40}"  # of a data set on the hub
FOLDER = Path(__file__).parents[1] / "sources"
SOURCES = tuple(sorted(module.name for module in pkgutil.iter_modules([str(FOLDER)]) if not module.ispkg))


def keys_used_by(source: str) -> tuple[str, ...]:
    """Return the subset keys that only some sources use, this one included."""
    keys: tuple[str, ...] = importlib.import_module(f"library.data.sources.{source}").SOURCE.keys
    return keys
