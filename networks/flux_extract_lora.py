"""Entry point for programs that start tools/extract_lora_from_models.py for FLUX.1 at this path."""

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.extract_lora_from_models import main, setup_parser

__all__ = ["main", "setup_parser"]

if __name__ == "__main__":
    sys.exit(main())
