"""Functions of sd-scripts' library.flux_train_utils for programs that import it; nothing here calls them."""

import argparse

from library.architectures.flux.options import FluxOptions
from library.data.description.schema import level_offset as timestep_sampling_offset
from library.training.command_line.cli import add_missing

__all__ = ["add_flux_train_arguments", "timestep_sampling_offset"]  # LoRA Forge looks for the second name


def add_flux_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of flux_train_network.py that a parser lacks."""
    add_missing(parser, FluxOptions)


AS_IMPORTED = dict(globals())  # detects names that a program patches, which has no effect
