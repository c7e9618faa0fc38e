"""Encode the images of a data set for flux_3_train_network.py."""

import argparse
import sys
from functools import partial

import flux_3_train_network
from library.architectures.flux_3.assembly import CODEC
from library.architectures.flux_3.load import open_encoder
from library.architectures.flux_3.options import Flux3Options
from library.training.command_line.caching import add_command_options, cache_images_to_disk, caching_command


def setup_parser() -> argparse.ArgumentParser:
    """Return the options of flux_3_train_network.py and those of musubi-tuner's caching commands."""
    return add_command_options(flux_3_train_network.setup_parser())


main = caching_command(
    setup_parser,
    partial(cache_images_to_disk, Flux3Options, CODEC, lambda options: open_encoder(options, "--vae").vae),
)

if __name__ == "__main__":
    sys.exit(main())
