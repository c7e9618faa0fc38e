"""The values of --base_format: the modules of library/memory/formats, listed without importing them or torch."""

import pkgutil
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "memory" / "formats"
BASE_FORMATS = tuple(sorted(module.name for module in pkgutil.iter_modules([str(FOLDER)])))
