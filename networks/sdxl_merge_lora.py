"""Entry point for programs that start networks/merge_lora.py for SDXL at this path."""

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from networks.merge_lora import main, merge, setup_parser

__all__ = ["main", "merge", "setup_parser"]

if __name__ == "__main__":
    sys.exit(main())
