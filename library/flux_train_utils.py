"""What programs that import sd-scripts' library call by these names; nothing here calls it."""

import argparse

from library.architectures.flux.options import FluxOptions
from library.training.command_line.cli import add_missing


def add_flux_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of flux_train_network.py that a parser lacks."""
    add_missing(parser, FluxOptions)


AS_IMPORTED = dict(globals())  # by which it is told what a program puts here that nothing uses
