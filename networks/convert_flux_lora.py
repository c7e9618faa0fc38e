"""Rename the keys of a FLUX.1 LoRA: the path at which other programs start tools/convert_for_comfyui.py."""

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.convert_for_comfyui import command_by_trainer

main = command_by_trainer(__doc__)

if __name__ == "__main__":
    sys.exit(main())
