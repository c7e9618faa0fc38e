"""Entry point for programs that start tools/resize_lora.py at this path."""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import resize_lora
from tools.command import complete_options
from tools.resize_lora import main, setup_parser

__all__ = ["main", "resize", "setup_parser"]


def resize(args: argparse.Namespace) -> None:
    """Resize as the command does, for programs that import this file. Raises UserError."""
    resize_lora.resize(complete_options(setup_parser(), args))


if __name__ == "__main__":
    sys.exit(main())
