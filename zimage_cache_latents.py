"""Encode the images of a data set for zimage_train_network.py; musubi-tuner has a command of this name."""

import sys

import zimage_train_network
from library.caching_script import CachingScript

SCRIPT = CachingScript(zimage_train_network.SCRIPT)
setup_parser = SCRIPT.setup_parser
main = SCRIPT.cache_latents

if __name__ == "__main__":
    sys.exit(main())
