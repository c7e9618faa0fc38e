"""Encode the captions of a data set for krea2_train_network.py; musubi-tuner has a command of this name."""

import sys
from functools import partial

from krea2_cache_latents import setup_parser
from library.architectures.krea2.assembly import build_for_caching
from library.architectures.krea2.options import Krea2Options
from library.training.command_line.caching import cache_captions_to_disk, caching_command

__all__ = ["main", "setup_parser"]

main = caching_command(setup_parser, partial(cache_captions_to_disk, Krea2Options, build_for_caching))

if __name__ == "__main__":
    sys.exit(main())
