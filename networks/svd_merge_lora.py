"""Entry point for programs that merge several LoRAs by SVD at this path: tools/merge_lora.py with rank 4 by default."""

import sys
from functools import partial
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.commands.command import command
from tools import merge_lora

setup_parser = partial(merge_lora.setup_parser, new_rank=4)
main = command(setup_parser, merge_lora.merge)

if __name__ == "__main__":
    sys.exit(main())
