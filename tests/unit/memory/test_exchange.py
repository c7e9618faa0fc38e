"""Two models exchange their weights in place, and are as before where that breaks off."""

import pytest
import torch
from torch import nn

from library.errors import UserError
from library.memory import exchange as module
from library.memory.exchange import exchange, exchange_weights
from library.memory.formats.int8 import Int8Rows
from library.memory.frozen import store_in
from tests.tiny.init import fixed_init


def model(seed: int, stores: bool = False) -> nn.Module:
    layers = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)).requires_grad_(False)
    layers.load_state_dict(fixed_init(layers, seed))
    if stores:
        store_in(Int8Rows(), layers[0])
    return layers


X = torch.linspace(-1, 1, 12).view(2, 6)


@pytest.mark.parametrize("stores", [False, True], ids=["numbers", "int8"])
def test_a_model_computes_what_the_other_does_in_between(stores: bool) -> None:
    one, two = model(1, stores), model(2, stores)
    expected, own = two(X), one(X)
    places = [parameter.data_ptr() for parameter in one.parameters()]
    with exchange_weights(one, two):
        assert torch.equal(one(X), expected) and torch.equal(two(X), own)
        assert [parameter.data_ptr() for parameter in one.parameters()] == places
    assert torch.equal(one(X), own) and torch.equal(two(X), expected) and not torch.equal(own, expected)


def test_an_error_in_between_gives_the_weights_back() -> None:
    one, two = model(1), model(2)
    own = one(X)
    with pytest.raises(RuntimeError, match="drawing"), exchange_weights(one, two):
        raise RuntimeError("drawing")
    assert torch.equal(one(X), own)


def test_a_copy_that_fails_leaves_all_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = model(1), model(2)
    own, others = one(X), two(X)
    swap, calls = module.swap, []

    def failing(first: torch.Tensor, second: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        swap(first, second)

    monkeypatch.setattr(module, "swap", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        exchange(one, two)
    assert torch.equal(one(X), own) and torch.equal(two(X), others) and len(calls) == 7


def test_models_that_are_stored_differently_are_refused() -> None:
    one, two = model(1), model(2, stores=True)
    own = one(X)
    with pytest.raises(UserError, match="stored differently"):
        exchange(one, two)
    assert torch.equal(one(X), own)
