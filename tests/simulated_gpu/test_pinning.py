"""A system that refuses to pin memory, as WSL2 does beyond about a gigabyte."""

import pytest
import torch

from library.memory.offload.pinning import pin
from library.memory.offload.ring import Ring
from library.memory.offload.streams import StagedStreams
from tests.simulated_gpu.device import Simulation

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("simulated_gpu")]
NUM_BLOCKS, NUM_BYTES = 6, 4096


def test_a_refusal_is_named_and_ends_no_later_kernel(simulated_gpu: Simulation) -> None:
    """CUDA keeps the error of a refused call, and the next kernel that is launched would raise it."""
    masters = [torch.full((NUM_BYTES,), number, dtype=torch.uint8) for number in range(NUM_BLOCKS)]
    before = simulated_gpu.stats()["pinned"]
    with simulated_gpu.configured(pin_limit_bytes=before + 4 * NUM_BYTES):
        assert pin(masters) == "cudaHostRegister failed: out of memory"
        assert simulated_gpu.stats()["pinned"] == before and not any(master.is_pinned() for master in masters)
        ring = Ring(masters, StagedStreams(2, NUM_BYTES, torch.device("cuda")))
        found = [ring.need(number).float().mean() for number in range(NUM_BLOCKS)]
        assert torch.stack(found).tolist() == [0, 1, 2, 3, 4, 5]
