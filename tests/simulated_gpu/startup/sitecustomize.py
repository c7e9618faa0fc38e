"""Simulated GPUs in every Python process that has this folder on PYTHONPATH, for commands that start others.

SIMULATED_ATOMICS=1 adds noise to attention's backward pass, SIMULATED_BYTES is the memory of a GPU.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from library.base.launcher import prepare_for_torch

prepare_for_torch()

from tests.simulated_gpu.device import Settings, insert  # noqa: E402, after the environment of torch is set

MEMORY_BYTES = int(os.environ.get("SIMULATED_BYTES", Settings.memory_bytes))
insert(Settings(memory_bytes=MEMORY_BYTES, has_atomics=os.environ.get("SIMULATED_ATOMICS") == "1"))
