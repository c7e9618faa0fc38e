"""The name and version of this suite; pyproject.toml reads the version from here."""

import argparse

NAME = "lora-training-suite"  # the program name in the metadata of trained files
VERSION = "0.1.0"


def add_version(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the option that shows the version to a command's parser, and return the parser."""
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}", help="show the version and exit")
    return parser
