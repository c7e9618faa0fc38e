"""Measure this suite, one module a measurement. `python3 -m benchmarks NAME --help` says what NAME measures."""

import sys

from benchmarks.runner import run_module

if __name__ == "__main__":
    sys.exit(run_module("benchmarks", __doc__, sys.argv[1:]))
