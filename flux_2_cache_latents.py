"""Encode the images of a data set for flux_2_train_network.py; musubi-tuner has a command of this name."""

import argparse
import sys
from functools import partial

import flux_2_train_network
from library.architectures.flux_2.assembly import CODEC
from library.architectures.flux_2.load import open_encoder
from library.architectures.flux_2.options import Flux2Options
from library.training.command_line.caching import add_command_options, cache_images_to_disk, caching_command


def setup_parser() -> argparse.ArgumentParser:
    """Return the options of flux_2_train_network.py and those of musubi-tuner's command."""
    return add_command_options(flux_2_train_network.setup_parser())


main = caching_command(
    setup_parser,
    partial(cache_images_to_disk, Flux2Options, CODEC, lambda options: open_encoder(options, "--vae")[0].vae),
)

if __name__ == "__main__":
    sys.exit(main())
