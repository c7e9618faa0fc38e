"""Encode the images of a data set for krea2_train_network.py; musubi-tuner has a command of this name."""

import argparse
import sys
from functools import partial

import krea2_train_network
from library.architectures.krea2.assembly import CODEC
from library.architectures.krea2.load import open_encoder
from library.architectures.krea2.options import Krea2Options
from library.training.command_line.caching import add_command_options, cache_images_to_disk, caching_command


def setup_parser() -> argparse.ArgumentParser:
    """Return the options of krea2_train_network.py and those of musubi-tuner's command."""
    return add_command_options(krea2_train_network.setup_parser())


main = caching_command(
    setup_parser,
    partial(cache_images_to_disk, Krea2Options, CODEC, lambda options: open_encoder(options, "--vae").vae),
)

if __name__ == "__main__":
    sys.exit(main())
