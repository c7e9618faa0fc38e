"""The device that the GPU tests run on, and which of them it can run.

Without a GPU they run on a simulated one (tests/simulated_gpu), with `-p tests.simulated_gpu.plugin`. Where that cannot
be built, `LORA_TEST_DEVICE=cpu` lets the CPU stand in; what only GPUs have is then left out.
"""

import os

import pytest
import torch

CPU_STANDS_IN = os.environ.get("LORA_TEST_DEVICE") == "cpu"
DEVICE = torch.device("cpu" if CPU_STANDS_IN else "cuda")
ON_CARD = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CPU_STANDS_IN or torch.cuda.is_available()), reason="needs a GPU"),
]
CARD_ONLY = pytest.mark.skipif(CPU_STANDS_IN, reason="the CPU cannot stand in")
