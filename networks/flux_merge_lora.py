"""Entry point for programs that start tools/merge_flux_lora.py at this path, with ratios as in merge_lora.py."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import merge_flux_lora
from tools.command import run
from tools.merge_adapters import square_strengths
from tools.merge_flux_lora import setup_parser

__all__ = ["main", "setup_parser"]


def merge(args: argparse.Namespace) -> None:
    """Read, merge and write the files. Raises UserError."""
    merge_flux_lora.merge(args, square_strengths)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(setup_parser(), merge, argv)


if __name__ == "__main__":
    sys.exit(main())
