"""Factors cast together for autocast: the bits of casts one by one, in fewer operations."""

import importlib
from collections import Counter
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from library.memory.blocks import BlockRunner, Every, plain, recompute
from library.memory.cast_together import CastTogether, cast_factors, cast_in_blocks
from library.training.models.block_running import cast_factors_of
from networks.core.protocol import adopt
from tests.tiers import first_is_fast
from tests.tiny.bases import BASES

RUNNERS = {"plain": lambda: plain, "recompute": lambda: recompute, "every second": lambda: Every(2, recompute)}
DEEP = ["sd", *(name for name, base in BASES.items() if base.deep is not None and name != "sd")]


class Casts(TorchDispatchMode):
    """Counts casts of single tensors and of lists."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func._overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("runner", RUNNERS)
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
        run: BlockRunner = RUNNERS[runner]()
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
