"""Make and check the toy models, one module a command. `python3 -m benchmarks.toys NAME --help` describes NAME."""

import sys

from benchmarks.runner import run_module

if __name__ == "__main__":
    sys.exit(run_module("benchmarks.toys", __doc__, sys.argv[1:]))
