"""Encode the captions of a data set for flux_3_train_network.py."""

import sys
from functools import partial

from flux_3_cache_latents import setup_parser
from library.architectures.flux_3.assembly import build_for_caching
from library.architectures.flux_3.options import Flux3Options
from library.training.command_line.caching import cache_captions_to_disk, caching_command

__all__ = ["main", "setup_parser"]

main = caching_command(setup_parser, partial(cache_captions_to_disk, Flux3Options, build_for_caching))

if __name__ == "__main__":
    sys.exit(main())
