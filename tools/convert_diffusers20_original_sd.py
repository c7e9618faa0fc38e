"""Alias of tools/convert_stable_diffusion.py under the name that other programs call."""

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.convert_stable_diffusion import main, setup_parser

__all__ = ["main", "setup_parser"]

if __name__ == "__main__":
    sys.exit(main())
