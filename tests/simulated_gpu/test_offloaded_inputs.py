"""GPU memory of --cpu_offload_checkpointing, by the allocator, where the host is a pass ahead."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from library.memory.activations import RecomputeFromMainMemory
from library.memory.blocks import BlockRunner, recompute
from tests.simulated_gpu.device import Simulation

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("simulated_gpu")]
WIDTH = 64
ALIKE = (512,) * 40
UNEQUAL = (*[512] * 12, *[256] * 12, *[128] * 12, *[256] * 12, *[512] * 12)  # numbers of tokens, as in a U-Net


class Block(nn.Module):
    """A layer with a residual, which then changes the number of tokens."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.num_tokens = num_tokens

    def forward(self, x_BTM: Tensor) -> Tensor:
        y_BTM = x_BTM + functional.gelu(self.layer(x_BTM))
        if y_BTM.shape[1] == self.num_tokens:
            return y_BTM
        return functional.interpolate(y_BTM.transpose(1, 2), self.num_tokens).transpose(1, 2).contiguous()


def peak_of(build: Callable[[], BlockRunner], sizes: Sequence[int]) -> tuple[int, int]:
    """Return the peak bytes (in tensors, taken from the GPU) of two passes, beyond the weights."""
    blocks = [Block(size).to("cuda").requires_grad_(False) for size in (*sizes[1:], sizes[-1])]
    run = build()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(2):
        y_BTM = torch.randn(1, sizes[0], WIDTH, device="cuda").requires_grad_() * 1
        for block in blocks:
            y_BTM = run(block, y_BTM)
        y_BTM.square().mean().backward()
        del y_BTM
    return torch.cuda.max_memory_allocated() - before[0], torch.cuda.max_memory_reserved() - before[1]


@pytest.mark.parametrize("sizes", [ALIKE, UNEQUAL], ids=["equal sizes", "unequal sizes"])
def test_offloaded_inputs_take_less_of_the_gpu_than_recomputation(
    simulated_gpu: Simulation, sizes: Sequence[int]
) -> None:
    input_bytes = 4 * WIDTH * sum(sizes)
    _, without = peak_of(lambda: recompute, sizes)
    in_tensors, taken = peak_of(RecomputeFromMainMemory, sizes)
    assert without > input_bytes
    # The step keeps some of the largest inputs whatever the number of blocks. The simulated allocator splits no memory,
    # so that of one size does not serve another.
    assert in_tensors < input_bytes / 4 and taken <= 1.5 * in_tensors
