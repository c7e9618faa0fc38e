"""Functions of sd-scripts' library.compile_utils for programs that import it; nothing here calls them."""

import argparse

from library.options.machine.compiling import CompileOptions
from library.training.command_line.cli import add_missing


def add_compile_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of compilation that a parser lacks."""
    add_missing(parser, CompileOptions)


AS_IMPORTED = dict(globals())  # detects names that a program patches, which has no effect
