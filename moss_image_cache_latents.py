"""Encode the images of a data set for moss_image_train_network.py; musubi-tuner has a command of this name."""

import argparse
import sys
from functools import partial

import moss_image_train_network
from library.architectures.moss_image.assembly import CODEC
from library.architectures.moss_image.load import open_encoder
from library.architectures.moss_image.options import MossImageOptions
from library.training.command_line.caching import add_command_options, cache_images_to_disk, caching_command


def setup_parser() -> argparse.ArgumentParser:
    """Return the options of moss_image_train_network.py and those of musubi-tuner's command."""
    return add_command_options(moss_image_train_network.setup_parser())


main = caching_command(
    setup_parser,
    partial(cache_images_to_disk, MossImageOptions, CODEC, lambda options: open_encoder(options, "--vae").vae),
)

if __name__ == "__main__":
    sys.exit(main())
