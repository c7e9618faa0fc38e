"""A model without a table entry, and the memory that a real step allocates according to torch's profiler."""

import gc
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from library.memory.blocks import BlockRunner, plain

NUM_HEADS = 4


class Adapter(nn.Module):
    """A low-rank adapter that replaces a layer's `forward`."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        self.original = layer.forward
        layer.forward = self.forward  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.original(x) + self.up(self.down(x))
        return adapted


class Attends(nn.Module):
    """Norm, attention and residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        q, k, v = (self.qkv(self.norm(x) * scale)).unflatten(-1, (3, NUM_HEADS, -1)).permute(2, 0, 3, 1, 4)
        y: Tensor = x + self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class Widens(nn.Module):
    """Norm, wide layer and residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 5 * width)
        self.down = nn.Linear(5 * width, width)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        y: Tensor = x + self.down(gelu(self.up(self.norm(x) * scale)))
        return y


class MadeUp(nn.Module):
    """Two stacks of blocks; between them the tokens are doubled."""

    def __init__(self, width: int, num_blocks: int) -> None:
        super().__init__()
        self.runner: BlockRunner = plain
        self.scale = nn.Linear(8, width)
        self.attending = nn.ModuleList(Attends(width) for _ in range(num_blocks))
        self.widening = nn.ModuleList(Widens(width) for _ in range(num_blocks))
        self.last = nn.Linear(width, 3)
        self.adapters = nn.ModuleList()

    def adapt(self, rank: int) -> None:
        """Freeze the model and put adapters on all layers of the blocks."""
        self.requires_grad_(False)
        blocks = [*self.attending, *self.widening]
        layers = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
        self.adapters.extend(Adapter(layer, rank) for layer in layers)

    def forward(self, x_BTM: Tensor, told_B8: Tensor) -> Tensor:
        scale_B1M = self.scale(told_B8)[:, None]
        for block in self.attending:
            x_BTM = self.runner(block, x_BTM, scale_B1M)
        x_BTM = torch.cat([x_BTM, x_BTM.flip(1)], dim=1)
        for block in self.widening:
            x_BTM = self.runner(block, x_BTM, scale_B1M)
        y_BT3: Tensor = self.last(x_BTM)
        return y_BT3


def allocated_peak(step: Callable[[], object], multiplies_bf16: bool = False) -> int:
    """Return the peak of bytes that torch's allocator held for tensors created in `step`, from profiler events.

    `multiplies_bf16` disables oneDNN, which allocates float32 copies on processors without bf16 instructions.

    Garbage of earlier tests is collected first: freed during the step, it would count as memory that the step frees.
    """
    gc.collect()
    gc.disable()
    matmul = torch.backends.mkldnn.flags(enabled=False, allow_tf32=None) if multiplies_bf16 else nullcontext()
    try:
        with matmul, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            step()
    finally:
        gc.enable()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
