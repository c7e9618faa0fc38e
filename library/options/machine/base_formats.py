"""The values of --base_format: file names in library/memory/formats, which imports no torch."""

import pkgutil
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "memory" / "formats"
BASE_FORMATS = tuple(sorted(module.name for module in pkgutil.iter_modules([str(FOLDER)])))
