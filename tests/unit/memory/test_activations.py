"""Inputs of recomputed blocks in main memory, and factors cast together: results do not change."""

import importlib
import weakref
from collections import Counter
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from library.memory.activations import BlockInputs, PinnedBudget, RecomputeFromMainMemory, Transfers
from library.memory.blocks import BlockRunner, Every, plain, recompute, run_encoder_layers_with
from library.memory.cast_together import CastTogether, cast_factors, cast_in_blocks
from library.training.models.block_running import cast_factors_of
from networks.core.protocol import adopt
from tests.hiding import lazily
from tests.tiers import first_is_fast
from tests.tiny.bases import BASES
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


# Factors cast together for autocast: the bits of casts one by one, in fewer operations.

CASTING_RUNNERS = {"plain": lambda: plain, "recompute": lambda: recompute, "every second": lambda: Every(2, recompute)}
DEEP = ["sd", *(name for name, base in BASES.items() if base.deep is not None and name != "sd")]


class Casts(TorchDispatchMode):
    """Counts casts of single tensors and of lists."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("runner", CASTING_RUNNERS)
@pytest.mark.parametrize("name", first_is_fast(DEEP))
def test_losses_and_gradients_are_the_same_to_the_bit_with_fewer_casts(name: str, runner: str) -> None:
    base = BASES[name]
    assert base.deep is not None
    results, casts = [], []
    for is_together in (False, True):
        model = base.deep.frozen(5)
        seen, module = base.deep.seen(model), importlib.import_module(base.module)
        torch.manual_seed(3)
        network = module.create_network(1.0, 4, 2, None, [], seen)
        network.apply_to([], seen, False, True)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.1)
        if is_together:
            cast_factors_of(adopt(network), base.deep.stacks(model))
        run: BlockRunner = CASTING_RUNNERS[runner]()
        base.deep.run_blocks_with(model, run)
        with Casts() as counted:
            with torch.autocast("cpu", torch.bfloat16):
                loss = base.deep.loss(model, torch.device("cpu"))
            loss.backward()
        assert all(isinstance(parameter, nn.Parameter) for parameter in network.parameters())
        results.append([loss, *(parameter.grad for parameter in network.parameters())])
        casts.append(counted.calls)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert any(gradient.any() for gradient in results[1][1:])
    in_blocks = len(list(chain.from_iterable(base.deep.stacks(model))))
    assert casts[0]["_foreach_copy_"] == 0 < casts[1]["_foreach_copy_"] <= 3 * in_blocks
    assert casts[1]["_to_copy"] < casts[0]["_to_copy"]


def test_an_unused_and_a_frozen_factor_have_no_gradient_and_others_that_of_their_cast() -> None:
    torch.manual_seed(8)
    used, unused, frozen = torch.randn(3, 5), torch.randn(4), torch.randn(5)
    used.requires_grad_(), unused.requires_grad_()
    casts = CastTogether.apply(torch.bfloat16, used, unused, frozen)  # type: ignore[no-untyped-call]
    expected = used.to(torch.bfloat16)
    assert [cast.dtype for cast in casts] == [torch.bfloat16] * 3 and torch.equal(casts[0], expected)
    weights = torch.randn(5, dtype=torch.bfloat16)
    (casts[0] @ weights * casts[2].sum()).square().sum().backward()
    gradient = used.grad
    used.grad = None
    (expected @ weights * frozen.to(torch.bfloat16).sum()).square().sum().backward()
    assert gradient is not None and gradient.dtype == torch.float32 and torch.equal(gradient, used.grad)
    assert unused.grad is None and frozen.grad is None


def test_every_step_casts_the_factors_as_the_last_step_left_them() -> None:
    torch.manual_seed(9)
    block, factor = nn.Linear(3, 3), nn.Linear(3, 2, bias=False)
    cast_in_blocks([block], {block: [factor]})
    optimizer = torch.optim.SGD(factor.parameters(), lr=1.0)
    for _ in range(3):
        before = factor.weight.detach().clone()
        with torch.autocast("cpu", torch.bfloat16), cast_factors(block):
            assert torch.equal(factor.weight, before.to(torch.bfloat16))
            factor(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(factor.weight, before)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_factors_are_given_back_after_an_error_and_stay_without_autocast(dtype: torch.dtype | None) -> None:
    block = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2, bias=False))
    factor = nn.Linear(3, 1, bias=False)
    cast_in_blocks([block], {block[1]: [factor]})
    before, seen = factor.weight, list[Tensor]()
    with pytest.raises(KeyError), torch.autocast("cpu", dtype, enabled=dtype is not None), cast_factors(block):
        seen.append(factor.weight)
        raise KeyError
    assert factor.weight is before and seen[0].dtype == (dtype or torch.float32) and seen[0].requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_factors_of_another_dtype_stay_as_they_are_without_autocast(dtype: torch.dtype) -> None:
    block, factor = nn.Linear(3, 3), nn.Linear(3, 1, dtype=dtype)
    cast_in_blocks([block], {block: [factor]})
    before = factor.weight
    with cast_factors(block):
        assert factor.weight is before
