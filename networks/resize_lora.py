"""Entry point for programs that start tools/resize_lora.py at this path."""

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.resize_lora import main, resize, setup_parser

__all__ = ["main", "resize", "setup_parser"]

if __name__ == "__main__":
    sys.exit(main())
