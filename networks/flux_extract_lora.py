"""Entry point for programs that start tools/extract_lora_from_models.py for FLUX.1 at this path."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools import extract_lora_from_models
from tools.command import run


def setup_parser() -> argparse.ArgumentParser:
    """Return the parser of tools/extract_lora_from_models.py, with one more option that has no effect."""
    parser = extract_lora_from_models.setup_parser()
    parser.add_argument("--mem_eff_safe_open", action="store_true", help="has no effect: weights are read one by one")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(setup_parser(), extract_lora_from_models.extract, argv)


if __name__ == "__main__":
    sys.exit(main())
