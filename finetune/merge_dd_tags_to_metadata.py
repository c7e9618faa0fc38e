"""The path under which other programs collect tags in a metadata file: tools/captions_to_metadata.py --field tags."""

import sys
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.commands.command import command
from tools import captions_to_metadata

setup_parser = partial(captions_to_metadata.setup_parser, "tags")
main = command(setup_parser, captions_to_metadata.collect)

if __name__ == "__main__":
    sys.exit(main())
