"""Entry point for programs that start tools/merge_lora.py at this path.

These programs pass ratios for sd-scripts' way of joining files, so ratios have sd-scripts' meaning here.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import merge_lora
from tools.command import complete_options, run
from tools.merge_adapters import square_strengths
from tools.merge_lora import setup_parser

__all__ = ["main", "merge", "setup_parser"]


def merge(args: argparse.Namespace) -> None:
    """Merge as the command does, for programs that import this file. Raises UserError."""
    merge_lora.merge(complete_options(setup_parser(), args), square_strengths)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(setup_parser(), merge, argv)


if __name__ == "__main__":
    sys.exit(main())
