"""The path under which other programs collect tags in a metadata file: tools/captions_to_metadata.py --field tags."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import captions_to_metadata
from tools.command import run


def setup_parser() -> argparse.ArgumentParser:
    """The options of tools/captions_to_metadata.py."""
    return captions_to_metadata.setup_parser("tags")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(setup_parser(), captions_to_metadata.collect, argv)


if __name__ == "__main__":
    sys.exit(main())
