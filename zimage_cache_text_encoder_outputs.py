"""Encode the captions of a data set for zimage_train_network.py; musubi-tuner has a command of this name."""

import sys
from functools import partial

from library.architectures.zimage.assembly import build_for_caching
from library.architectures.zimage.options import ZImageOptions
from library.training.command_line.caching import cache_captions_to_disk, caching_command
from zimage_cache_latents import setup_parser

__all__ = ["main", "setup_parser"]

main = caching_command(setup_parser, partial(cache_captions_to_disk, ZImageOptions, build_for_caching))

if __name__ == "__main__":
    sys.exit(main())
