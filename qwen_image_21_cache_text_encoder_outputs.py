"""Encode the captions of a data set for qwen_image_21_train_network.py; musubi-tuner has a command of this name."""

import sys
from functools import partial

from library.architectures.qwen_image_21.assembly import build_for_caching
from library.architectures.qwen_image_21.options import QwenImage21Options
from library.training.command_line.caching import cache_captions_to_disk, caching_command
from qwen_image_21_cache_latents import setup_parser

__all__ = ["main", "setup_parser"]

main = caching_command(setup_parser, partial(cache_captions_to_disk, QwenImage21Options, build_for_caching))

if __name__ == "__main__":
    sys.exit(main())
