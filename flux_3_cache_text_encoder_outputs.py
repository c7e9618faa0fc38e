"""Encode the captions of a data set for flux_3_train_network.py."""

import sys

import flux_3_train_network
from library.caching_script import CachingScript

SCRIPT = CachingScript(flux_3_train_network.SCRIPT)
setup_parser = SCRIPT.setup_parser
main = SCRIPT.cache_captions

if __name__ == "__main__":
    sys.exit(main())
