"""Encode the captions of a data set for Qwen-Image 2.1: musubi-tuner's command."""

import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's folder goes before this one, which has equal names
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.training.command_line.caching_script import CachingScript

SCRIPT = CachingScript("qwen_image_21")
setup_parser = SCRIPT.setup_captions_parser
main = SCRIPT.cache_captions

if __name__ == "__main__":
    sys.exit(main())
