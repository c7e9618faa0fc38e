"""Entry point for programs that merge several LoRAs by SVD at this path: tools/merge_lora.py with rank 4 by default."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import merge_lora
from tools.command import run

DEFAULT_RANK = 4


def setup_parser() -> argparse.ArgumentParser:
    """Return the parser of tools/merge_lora.py with another default of --new_rank."""
    return merge_lora.setup_parser(new_rank=DEFAULT_RANK)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(setup_parser(), merge_lora.merge, argv)


if __name__ == "__main__":
    sys.exit(main())
