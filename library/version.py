"""The version of this suite; pyproject.toml reads it from here."""

import argparse

VERSION = "0.1.0"


def add_version(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add --version to a command's parser and return the parser."""
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}", help="show the version and exit")
    return parser
