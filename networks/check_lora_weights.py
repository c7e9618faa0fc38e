"""Entry point for front ends that start tools/check_lora_weights.py at this path."""

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.check_lora_weights import main

if __name__ == "__main__":
    sys.exit(main())
