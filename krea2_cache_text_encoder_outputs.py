"""Encode the captions of a data set for krea2_train_network.py; musubi-tuner has a command of this name."""

import argparse
import sys
from collections.abc import Sequence

from krea2_cache_latents import setup_parser
from library.architectures.krea2.assembly import build_for_caching
from library.architectures.krea2.options import Krea2Options
from library.training.command_line.caching import cache_captions_to_disk, run_command

__all__ = ["cache_to_disk", "main", "setup_parser"]


def cache_to_disk(args: argparse.Namespace) -> None:
    """Encode every caption whose cache file is missing or outdated. Raises UserError."""
    cache_captions_to_disk(args, Krea2Options, build_for_caching)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(setup_parser(), cache_to_disk, argv)


if __name__ == "__main__":
    sys.exit(main())
