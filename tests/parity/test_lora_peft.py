"""Adapted layers against PEFT's: the same factors give the same outputs and the same gradients."""

import pytest
import torch
from torch import nn

from networks.core.kinds.lora import LowRank
from networks.core.sites.targets import kind_of
from tests.tolerances import FLOAT64
from tests.unit.networks.one_layer import adapter_on, double

peft = pytest.importorskip("peft")

SHAPES = {
    "linear": (lambda: nn.Linear(11, 6), (2, 5, 11)),
    "conv": (lambda: nn.Conv2d(11, 6, 3, stride=2, padding=1), (2, 11, 6, 6)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients_equal_those_of_peft(name: str) -> None:
    make, shape = SHAPES[name]
    torch.manual_seed(431)
    layer = make().double().requires_grad_(False)
    wrapped = nn.Sequential(make()).double()
    wrapped[0].load_state_dict(layer.state_dict())
    config = peft.LoraConfig(r=4, lora_alpha=3.0, target_modules=["0"], init_lora_weights=False)
    theirs = peft.get_peft_model(wrapped, config).double()
    their_down, their_up = (p for p in theirs.parameters() if p.requires_grad)

    kind = kind_of(layer)
    assert kind is not None
    ours = double(adapter_on(layer, LowRank(layer, 4), 3.0))
    ours.change.load_state_dict(
        {"alpha": ours.change.alpha, "lora_down.weight": their_down, "lora_up.weight": their_up}
    )
    ours.install()
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), theirs(x), **FLOAT64)
    layer(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.change.get_parameter("lora_down.weight").grad, their_down.grad, **FLOAT64)
    torch.testing.assert_close(ours.change.get_parameter("lora_up.weight").grad, their_up.grad, **FLOAT64)
    assert their_down.grad.abs().max() > 0.01
