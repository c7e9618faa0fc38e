"""The path under which other programs start tools/merge_lora.py for SDXL."""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import merge_lora
from tools.command import completed
from tools.merge_lora import main, setup_parser

__all__ = ["main", "merge", "setup_parser"]


def merge(args: argparse.Namespace) -> None:
    """The command as a function, for programs that import this file. Raises UserError."""
    merge_lora.merge(completed(setup_parser(), args))


if __name__ == "__main__":
    sys.exit(main())
