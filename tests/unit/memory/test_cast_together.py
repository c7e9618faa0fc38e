"""Factors cast together for autocast: the bits of casts one by one, in fewer operations."""

import importlib
from collections import Counter
from contextlib import nullcontext
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from library.memory.blocks import BlockBody, BlockRunner, Every, plain, recompute
from library.memory.cast_together import FACTORS, CastTogether, Factors, cast_factors, cast_in_blocks, given_as
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


def make_adapted(name: str) -> tuple[Any, Any]:
    """Return (a model, its LoRA, with no factor at zero), the same each time."""
    base = BASES[name]
    assert base.deep is not None
    model = base.deep.frozen(5)
    seen = base.deep.seen(model)
    torch.manual_seed(3)
    network = importlib.import_module(base.module).create_network(1.0, 4, 2, None, [], seen)
    network.apply_to([], seen, False, True)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model, network


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", first_is_fast(DEEP))
def test_losses_and_gradients_are_the_same_to_the_bit_with_fewer_casts(name: str, runner: str) -> None:
    base = BASES[name]
    assert base.deep is not None
    results, casts = [], []
    for is_together in (False, True):
        model, network = make_adapted(name)
        if is_together:
            cast_in_blocks(chain.from_iterable(base.deep.stacks(model)), dict(network.cast_factors()))
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


JOINING = ["sd", "anima", "flux_3", "krea2", "lumina", "moss_image", "qwen_image_21", "zimage"]


@pytest.mark.parametrize("name", first_is_fast(JOINING))
def test_factors_of_one_input_give_the_same_loss_and_gradients_in_fewer_products(name: str) -> None:
    base = BASES[name]
    assert base.deep is not None
    results, products = [], []
    for is_joined in (False, True):
        model, network = make_adapted(name)
        stacks = base.deep.stacks(model)
        if is_joined:
            cast_factors_of(adopt(network), stacks)
        else:
            cast_in_blocks(chain.from_iterable(stacks), dict(network.cast_factors()))
        base.deep.run_blocks_with(model, in_float32)
        with Casts() as counted:
            loss = base.deep.loss(model, torch.device("cpu"))
            loss.backward()
        results.append([loss, *(parameter.grad for parameter in network.parameters())])
        products.append(counted.calls["mm"] + counted.calls["addmm"])
    scale = max(float(gradient.abs().max()) for gradient in results[0][1:])
    for apart, joined in zip(*results, strict=True):
        torch.testing.assert_close(joined, apart, rtol=1e-5, atol=4e-6 * scale)
    blocks = chain.from_iterable(stacks)
    saved = sum(len(group) - 1 for block in blocks if block in FACTORS for group in FACTORS[block].joined)
    assert saved and products[0] - products[1] >= 2 * saved  # forward, backward to the factors, and to most inputs


def in_float32(block: nn.Module, *inputs: Any, **named: Any) -> Any:
    factors = FACTORS.get(block.block if isinstance(block, BlockBody) else block)
    with nullcontext() if factors is None else given_as(factors, torch.float32):
        return block(*inputs, **named)


def test_a_layer_with_another_input_gets_its_own_product() -> None:
    """Queries of cross-attention can be as wide as its keys and values."""
    torch.manual_seed(4)
    downs = [nn.Linear(5, rank, bias=False) for rank in (2, 3, 1)]
    image = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    text = torch.randn(2, 4, 5, dtype=torch.float64)
    inputs = (image, text, text)
    expected = [linear(x, down.weight.double()) for down, x in zip(downs, inputs, strict=True)]
    weights = [torch.randn_like(product) for product in expected]
    parameters = [image, *(down.weight for down in downs)]
    gradients = torch.autograd.grad(expected, parameters, weights)
    with Casts() as counted, given_as(Factors([], [downs]), torch.float64):
        products = [down.product(x) for down, x in zip(downs, inputs, strict=True)]
    assert counted.calls["mm"] == 2  # the queries', and one for keys and values
    torch.testing.assert_close(products, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(products, parameters, weights), gradients)  # type: ignore[arg-type]
    assert not any(hasattr(down, "product") for down in downs)


@pytest.mark.parametrize("argument", ["rank_dropout", "module_dropout", "dora_wd", "ggpo_sigma"])
def test_dropout_and_other_changes_are_computed_alone(argument: str) -> None:
    base = BASES["sd"]
    assert base.deep is not None
    seen = base.deep.seen(base.deep.frozen(5))
    module = importlib.import_module(base.module)
    values = {"dora_wd": "True", "ggpo_sigma": "0.03"} | ({"ggpo_beta": "0.01"} if argument == "ggpo_sigma" else {})
    given = {name: value for name, value in values.items() if name[:4] == argument[:4]} or {argument: "0.5"}
    assert list(module.create_network(1.0, 4, 2, None, [], seen).joined_downs())
    assert not list(module.create_network(1.0, 4, 2, None, [], seen, **given).joined_downs())


def test_an_unused_and_a_frozen_factor_have_no_gradient_and_others_that_of_their_cast() -> None:
    torch.manual_seed(8)
    used, unused, frozen = torch.randn(3, 5), torch.randn(4), torch.randn(5)
    used.requires_grad_(), unused.requires_grad_()
    casts = CastTogether.apply(torch.bfloat16, [], used, unused, frozen)  # type: ignore[no-untyped-call]
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
