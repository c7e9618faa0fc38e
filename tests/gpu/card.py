"""What the tests for a card share.

`LORA_TEST_DEVICE=cpu` lets the CPU stand in for the card, so that these tests can be tried without one; what only cards
have is then left out.
"""

import os

import pytest
import torch

CPU_STANDS_IN = os.environ.get("LORA_TEST_DEVICE") == "cpu"
DEVICE = torch.device("cpu" if CPU_STANDS_IN else "cuda")
ON_CARD = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (CPU_STANDS_IN or torch.cuda.is_available()), reason="needs a CUDA card"),
]
CARD_ONLY = pytest.mark.skipif(CPU_STANDS_IN, reason="the CPU cannot stand in")
