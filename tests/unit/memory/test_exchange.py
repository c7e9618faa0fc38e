"""Two models exchange their weights in place, and are restored if that is interrupted."""

import pytest
import torch
from torch import nn

from library.base.errors import UserError
from library.memory import exchange as module
from library.memory.exchange import exchange, exchange_weights
from library.memory.formats.int8 import Int8Rows
from library.memory.frozen import freeze_layer
from tests.tiny.init import fixed_init


def model(seed: int, stores: bool = False) -> nn.Module:
    layers = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)).requires_grad_(False)
    layers.load_state_dict(fixed_init(layers, seed))
    if stores:
        freeze_layer(Int8Rows(), layers[0])
    return layers


X = torch.linspace(-1, 1, 12).view(2, 6)


@pytest.mark.parametrize("stores", [False, True], ids=["numbers", "int8"])
def test_models_compute_each_others_outputs_during_an_exchange(stores: bool) -> None:
    first, second = model(1, stores), model(2, stores)
    expected, before = second(X), first(X)
    places = [parameter.data_ptr() for parameter in first.parameters()]
    with exchange_weights(first, second):
        assert torch.equal(first(X), expected) and torch.equal(second(X), before)
        assert [parameter.data_ptr() for parameter in first.parameters()] == places
    assert torch.equal(first(X), before) and torch.equal(second(X), expected) and not torch.equal(before, expected)


def test_an_error_during_an_exchange_restores_the_weights() -> None:
    first, second = model(1), model(2)
    before = first(X)
    with pytest.raises(RuntimeError, match="drawing"), exchange_weights(first, second):
        raise RuntimeError("drawing")
    assert torch.equal(first(X), before)


def test_a_failed_copy_leaves_both_models_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    model_a, model_b = model(1), model(2)
    before, other_before = model_a(X), model_b(X)
    swap, calls = module.swap, []

    def failing(first: torch.Tensor, second: torch.Tensor) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        swap(first, second)

    monkeypatch.setattr(module, "swap", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        exchange(model_a, model_b)
    assert torch.equal(model_a(X), before) and torch.equal(model_b(X), other_before) and len(calls) == 7


def test_models_in_different_storage_formats_are_refused() -> None:
    first, second = model(1), model(2, stores=True)
    before = first(X)
    with pytest.raises(UserError, match="stored differently"):
        exchange(first, second)
    assert torch.equal(first(X), before)
