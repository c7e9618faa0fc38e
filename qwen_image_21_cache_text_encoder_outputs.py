"""Encode the captions of a data set for qwen_image_21_train_network.py; musubi-tuner has a command of this name."""

import argparse
import sys
from collections.abc import Sequence

from library.architectures.qwen_image_21.assembly import build_for_caching
from library.architectures.qwen_image_21.options import QwenImage21Options
from library.training.command_line.caching import cache_captions_to_disk, run_command
from qwen_image_21_cache_latents import setup_parser

__all__ = ["cache_to_disk", "main", "setup_parser"]


def cache_to_disk(args: argparse.Namespace) -> None:
    """Encode every caption whose cache file is missing or outdated. Raises UserError."""
    cache_captions_to_disk(args, QwenImage21Options, build_for_caching)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run_command(setup_parser(), cache_to_disk, argv)


if __name__ == "__main__":
    sys.exit(main())
