"""Encode the captions of a data set for moss_image_train_network.py; musubi-tuner has a command of this name."""

import sys
from functools import partial

from library.architectures.moss_image.assembly import build_for_caching
from library.architectures.moss_image.options import MossImageOptions
from library.training.command_line.caching import cache_captions_to_disk, caching_command
from moss_image_cache_latents import setup_parser

__all__ = ["main", "setup_parser"]

main = caching_command(setup_parser, partial(cache_captions_to_disk, MossImageOptions, build_for_caching))

if __name__ == "__main__":
    sys.exit(main())
