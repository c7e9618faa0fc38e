"""The device of the GPU tests, and the tests that it can run.

Without a GPU they run on a simulated one (tests/simulated_gpu), with `-p tests.simulated_gpu.plugin`. If that cannot
be built, `LORA_TEST_DEVICE=cpu` runs them on the CPU without the parts that need a GPU.
"""

import os

import pytest
import torch

RUNS_ON_CPU = os.environ.get("LORA_TEST_DEVICE") == "cpu"
DEVICE = torch.device("cpu" if RUNS_ON_CPU else "cuda")
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not (RUNS_ON_CPU or torch.cuda.is_available()), reason="needs a GPU")]
GPU_ONLY = pytest.mark.skipif(RUNS_ON_CPU, reason="the CPU cannot stand in")
