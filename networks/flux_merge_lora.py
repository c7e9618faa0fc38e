"""Entry point for programs that start tools/merge_flux_lora.py at this path, with ratios as in merge_lora.py."""

import sys
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.commands.command import command
from tools import merge_flux_lora

merge, setup_parser = partial(merge_flux_lora.merge, squares=True), merge_flux_lora.setup_parser
main = command(setup_parser, merge)

if __name__ == "__main__":
    sys.exit(main())
