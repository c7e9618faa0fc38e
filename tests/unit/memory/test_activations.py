"""Inputs of recomputed blocks in main memory, and factors cast together: results do not change."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from library.memory.activations import BlockInputs, PinnedBudget, RecomputeFromMainMemory, Transfers
from library.memory.blocks import BlockRunner, Every, plain, recompute, run_encoder_layers_with
from tests.hiding import lazily
from tests.tiny.init import fixed_init
from tests.tiny.sd import CLIP

transformers = lazily("transformers")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor, positions: Tensor, pair: tuple[Tensor, Tensor], *, mask: Tensor | None) -> Tensor:
        y = self.layer(x * positions) + pair[0]
        return torch.tanh(y if mask is None else y * mask)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return the list of tensors that were moved to main memory."""
    tensors: list[Tensor] = []
    add = BlockInputs.add

    def noting(inputs: BlockInputs, tensor: Tensor) -> int:
        tensors.append(tensor)
        return add(inputs, tensor)

    monkeypatch.setattr(BlockInputs, "add", noting)
    return tensors


def test_only_inputs_with_a_gradient_move_and_the_gradients_are_the_same(moved: list[Tensor]) -> None:
    torch.manual_seed(101)
    block = Block()
    x, positions, other, mask = (torch.randn(3, 6) for _ in range(4))
    results = []
    for runner in (plain, RecomputeFromMainMemory()):
        leaf = x.clone().requires_grad_()
        y = runner(block, leaf * 2, positions, (other, other), mask=mask)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, *(p.grad.clone() for p in block.parameters() if p.grad is not None)))
        block.zero_grad()
    assert [tuple(tensor.shape) for tensor in moved] == [(3, 6)] and torch.equal(moved[0], 2 * x)
    assert len(results[0]) == 4 and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_gradients_nothing_moves(moved: list[Tensor]) -> None:
    with torch.no_grad():
        RecomputeFromMainMemory()(Block(), torch.ones(2, 6), torch.ones(6), (torch.ones(6), torch.ones(6)), mask=None)
    assert moved == []


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_an_offloaded_tensor_comes_back_unchanged(memory_format: torch.memory_format) -> None:
    tensor = torch.randn(2, 3, 4, 5).to(memory_format=memory_format)
    inputs = BlockInputs(lambda: None, Transfers(PinnedBudget()))
    assert inputs.add(tensor) == 0 and inputs.add(tensor + 1) == 1
    for i in (0, 1, 0):  # the third as in a second backward pass
        back = inputs.take(i)
        assert back.data_ptr() != tensor.data_ptr()
        assert torch.equal(back, tensor + i) and back.stride() == tensor.stride()


def test_inputs_of_a_dropped_graph_are_freed() -> None:
    run = RecomputeFromMainMemory()
    y = run(nn.Linear(6, 6), torch.randn(2, 6).requires_grad_() * 2)
    saved = run.last()
    assert saved is not None and len(saved.offloaded) == 1
    reference = weakref.ref(saved)
    del saved, y
    assert reference() is None and run.last() is None


RUNNERS: dict[str, Callable[[], BlockRunner]] = {
    "from main memory": RecomputeFromMainMemory,
    "every second, from main memory": lambda: Every(2, RecomputeFromMainMemory()),
}


@pytest.mark.parametrize("build", RUNNERS.values(), ids=RUNNERS)
def test_inputs_of_text_encoder_layers_are_offloaded_too(build: Callable[[], BlockRunner], moved: list[Tensor]) -> None:
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP)).eval()
    clip.load_state_dict(fixed_init(clip, 102))
    ids = torch.tensor([[0, 5, 7, 1], [0, 3, 1, 1]])

    def gradients() -> list[Tensor]:
        clip.zero_grad()
        clip(ids).last_hidden_state.square().sum().backward()
        return [p.grad.clone() for p in clip.parameters() if p.grad is not None]

    alone = gradients()
    run_encoder_layers_with(clip, build())
    offloaded = gradients()
    assert len(offloaded) == len(alone) > 10 and all(torch.equal(a, b) for a, b in zip(offloaded, alone, strict=True))
    num_layers = CLIP["num_hidden_layers"]
    assert len(moved) == (num_layers if build is RecomputeFromMainMemory else -(-num_layers // 2))


@pytest.mark.parametrize(("n", "recomputed"), [(1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3])])
def test_every_nth_block_is_recomputed_in_every_pass(n: int, recomputed: list[int]) -> None:
    blocks = [nn.Linear(3, 3) for _ in range(5)]
    ran: list[int] = []

    def noting(block: nn.Module, *inputs: Tensor) -> Tensor:
        ran.append(blocks.index(block))  # type: ignore[arg-type]
        result: Tensor = recompute(block, *inputs)
        return result

    runner = Every(n, noting)
    for _ in range(2):
        x = torch.ones(1, 3)
        for block in blocks:
            x = runner(block, x)
    assert ran == recomputed * 2
