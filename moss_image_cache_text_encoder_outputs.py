"""Encode the captions of a data set for moss_image_train_network.py; musubi-tuner has a command of this name."""

import sys

import moss_image_train_network
from library.caching_script import CachingScript

SCRIPT = CachingScript(moss_image_train_network.SCRIPT)
setup_parser = SCRIPT.setup_parser
main = SCRIPT.cache_captions

if __name__ == "__main__":
    sys.exit(main())
