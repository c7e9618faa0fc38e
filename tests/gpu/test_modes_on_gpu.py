"""Every memory mode on a GPU: complete denoisers train as in the plain mode.

Both run on the same GPU with the same kernels, so unquantised weights agree up to the order of float32 sums (flash
attention and convolutions may sum in any order), and so do quantised ones.
"""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from library.memory.offload import streamed
from library.memory.offload.pinning import Pinned
from library.memory.offload.streams import CudaStreams, StagedStreams
from tests.gpu.device import DEVICE, GPU_ONLY, ON_GPU
from tests.parity.deep import DEEP
from tests.parity.modes import Mode, gradients

pytestmark = ON_GPU
SAME_KERNELS = 1e-4  # of a gradient's size


def agree(actual: list[Tensor], wanted: list[Tensor]) -> bool:
    pairs = zip(actual, wanted, strict=True)
    return all(bool((a - b).norm() <= SAME_KERNELS * b.norm() + 1e-9) for a, b in pairs)


FAST = ("flux-none-plain", "flux-fp8-recompute_from_main_memory")
MODES = [
    pytest.param(*mode, marks=[] if "-".join(mode) in FAST else pytest.mark.slow, id="-".join(mode))
    for mode in product(DEEP, ("none", "fp8", "int8_rotated", "nf4_double"), ("plain", "recompute_from_main_memory"))
]


@pytest.mark.parametrize(("base", "form", "runner"), MODES)
def test_swapped_blocks_train_like_blocks_on_the_gpu(base: str, form: str, runner: str) -> None:
    stay = gradients(Mode(base, form, adapter="dora"), device=DEVICE)
    wait = gradients(Mode(base, form, "streamed", runner, "dora"), device=DEVICE)
    assert len(stay) > 10 and agree(wait, stay)


@GPU_ONLY
@pytest.mark.slow
@pytest.mark.parametrize("streams", [CudaStreams, StagedStreams])
def test_pinned_and_staged_copies_are_both_used_and_give_equal_results(
    streams: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    stay = gradients(Mode("flux", adapter="lora"), device=DEVICE)
    opened: list[object] = []
    open_streams: Callable[..., object] = streamed.open_streams
    if streams is StagedStreams:
        monkeypatch.setattr(streamed, "pin", lambda masters, reserve, share: Pinned(frozenset(), "it is not wanted"))
    monkeypatch.setattr(
        streamed, "open_streams", lambda *stream_arguments: opened.append(open_streams(*stream_arguments)) or opened[-1]
    )
    for _ in range(20):  # a missing wait only shows now and then
        assert agree(gradients(Mode("flux", place="streamed", adapter="lora"), device=DEVICE), stay)
    assert all(type(opened_streams) is streams for opened_streams in opened) and len(opened) == 20


@GPU_ONLY
def test_swapped_weights_take_two_slots_of_gpu_memory() -> None:
    from library.memory.codecs.plain import Plain
    from library.memory.frozen import freeze_layers, layers_in_blocks

    deep = DEEP["flux"]
    model = deep.frozen(91)
    freeze_layers(Plain(), layers_in_blocks(model).values())
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    ring = streamed.stream(deep.stacks(model), [2, 4], DEVICE)
    assert ring is not None
    slots = 2 * max(map(len, ring.masters))
    assert slots <= torch.cuda.memory_allocated() - before <= slots + 2 * 512  # the allocator rounds up to 512 bytes
