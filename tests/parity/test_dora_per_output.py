"""DoRA with one magnitude per output against LyCORIS (wd_on_output) and PEFT (use_dora) in float64: equal tensors
give equal outputs, gradients, merged weights and files."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks.core.changes.adapter import Adapter
from networks.core.changes.change import Delta
from networks.core.changes.dora import Decompose
from networks.core.changes.low_rank import LowRank
from networks.core.changes.qkv_rows import peft_magnitudes
from networks.core.changes.tucker import Tucker
from networks.core.kinds.loha import LoHa
from networks.core.kinds.lokr import make_fresh
from tests.hiding import lazily
from tests.tolerances import FLOAT64
from tests.unit.networks.one_layer import adapter_on, double, module_of

lycoris = lazily("lycoris.modules")
peft = lazily("peft")

LAYERS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 12), (2, 5, 16)),
    "without bias": (lambda: nn.Linear(16, 12, bias=False), (7, 16)),
    "1x1": (lambda: nn.Conv2d(16, 12, 1), (2, 16, 4, 4)),
    "square 3x3": (lambda: nn.Conv2d(12, 12, 3, stride=2, padding=1), (2, 12, 6, 6)),
}
KINDS: dict[str, tuple[Callable[[Any], Delta], str, dict[str, Any]]] = {
    "LoRA": (lambda layer: LowRank(layer, 3), "LoConModule", {}),
    "Tucker": (lambda layer: Tucker(layer, 3), "LoConModule", {"use_tucker": True}),
    "LoHa": (lambda layer: LoHa(layer, 3), "LohaModule", {}),
    "LoHa with cores": (lambda layer: LoHa(layer, 3, True), "LohaModule", {"use_tucker": True}),
    "LoKr": (lambda layer: make_fresh(layer, 3, 2), "LokrModule", {"factor": 2}),
    "whole LoKr": (
        lambda layer: make_fresh(layer, 3, 4, is_full=True),
        "LokrModule",
        {"factor": 4, "full_matrix": True},
    ),
}
CORES = ("Tucker", "LoHa with cores")
CASES = [case for case in product(LAYERS, KINDS, (False, True)) if case[0] == "square 3x3" or case[1] not in CORES]


def pair(name: str, kind: str, has_scalar: bool) -> tuple[Adapter, Any, Any]:
    """Return our adapter, LyCORIS's with the same tensors, and the layer on which theirs is installed."""
    torch.manual_seed(5100 + CASES.index((name, kind, has_scalar)))
    layer = LAYERS[name][0]().double().requires_grad_(False)
    make, theirs_name, settings = KINDS[kind]
    ours = double(
        adapter_on(layer, make(layer), 2.0, Decompose(layer.weight, is_per_output=True), has_scalar=has_scalar)
    )
    theirs = getattr(lycoris, theirs_name)(
        "x", layer, 1.0, 3, 2.0, use_scalar=has_scalar, weight_decompose=True, wd_on_out=True, **settings
    ).double()
    change = module_of(ours)
    with torch.no_grad():
        for parameter in change.parameters():
            parameter.copy_(parameter * 0.8 + torch.randn_like(parameter) * 0.3)
        for key, parameter in theirs.named_parameters():
            parameter.copy_(change.get_parameter(key))
    return ours, theirs, layer


def results(layer: Any, change: nn.Module, x: Tensor, keys: list[str]) -> list[Tensor]:
    """Return the output and the gradients of x and the parameters."""
    y = layer(x)
    return [y, *torch.autograd.grad(y.square().sum(), (x, *(change.get_parameter(key) for key in keys)))]


@pytest.mark.parametrize(("name", "kind", "has_scalar"), CASES)
def test_layer_merged_weight_and_file_match_lycoris(name: str, kind: str, has_scalar: bool) -> None:
    ours, theirs, layer = pair(name, kind, has_scalar)
    x = torch.randn(LAYERS[name][1], dtype=torch.float64, requires_grad=True)
    keys = [key for key, _ in module_of(ours).named_parameters()]
    alone = layer(x)
    ours.install()
    got = results(layer, module_of(ours), x, keys)
    ours.remove()
    theirs.apply_to()
    expected = results(layer, theirs, x, keys)
    theirs.restore()
    assert (got[0] - alone).abs().max() > 0.05
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, **FLOAT64)
    columns = torch.eye(layer.weight[0].numel(), dtype=torch.float64)
    if isinstance(layer, nn.Linear):
        theirs.apply_to()
        weight = (layer(columns) - (0 if layer.bias is None else layer.bias)).t()
        theirs.restore()
        torch.testing.assert_close(ours.merged()["weight"], weight, **FLOAT64)
    mine, other = ours.change.stored_tensors(), theirs.custom_state_dict()
    assert mine["dora_scale"].shape == other["dora_scale"].shape
    torch.testing.assert_close(mine["dora_scale"], other["dora_scale"], **FLOAT64)


@pytest.mark.parametrize("name", LAYERS)
def test_initial_magnitudes_match_lycoris_and_peft(name: str) -> None:
    torch.manual_seed(5180)
    layer = LAYERS[name][0]().double()
    ours = Decompose(layer.weight, is_per_output=True).magnitudes()
    theirs = lycoris.LoConModule("x", layer, 1.0, 3, 2.0, weight_decompose=True, wd_on_out=True)
    assert ours.shape == theirs.dora_scale.shape
    # LyCORIS's magnitudes are computed from float32 weights.
    torch.testing.assert_close(ours.float(), theirs.dora_scale, rtol=1e-6, atol=0)
    magnitudes = peft_layer(layer)[1].lora_magnitude_vector["default"].weight
    torch.testing.assert_close(peft_magnitudes(magnitudes, layer.weight.dim()), ours, **FLOAT64)


def peft_layer(layer: Any) -> tuple[Any, Any]:
    """Return (a model of this layer with PEFT's DoRA, the wrapped layer)."""
    config = peft.LoraConfig(r=3, lora_alpha=2.0, target_modules=["0"], use_dora=True, init_lora_weights=True)
    model = peft.get_peft_model(nn.Sequential(layer), config).double()
    return model, model.base_model.model[0]


@pytest.mark.parametrize("name", LAYERS)
def test_layer_and_merged_weight_match_peft(name: str) -> None:
    """PEFT excludes the norm from the backward pass, like dora_constant_norm."""
    torch.manual_seed(5190)
    layer = LAYERS[name][0]().double().requires_grad_(False)
    twin = LAYERS[name][0]().double()
    twin.load_state_dict(layer.state_dict())
    join = Decompose(layer.weight, has_constant_norm=True, is_per_output=True)
    ours = double(adapter_on(layer, LowRank(layer, 3), 2.0, join))
    model, wrapped = peft_layer(twin)
    change = module_of(ours)
    theirs = {
        "lora_down.weight": wrapped.lora_A["default"].weight,
        "lora_up.weight": wrapped.lora_B["default"].weight,
        "dora_scale": wrapped.lora_magnitude_vector["default"].weight,
    }
    with torch.no_grad():
        for leaf, parameter in theirs.items():
            parameter.copy_(parameter * 0.8 + torch.randn_like(parameter) * 0.3)
            our_parameter = change.get_parameter(leaf)
            our_parameter.copy_(peft_magnitudes(parameter, layer.weight.dim()) if leaf == "dora_scale" else parameter)
    x = torch.randn(LAYERS[name][1], dtype=torch.float64, requires_grad=True)
    ours.install()
    got = results(layer, change, x, list(theirs))
    y = model(x)
    expected = [y, *torch.autograd.grad(y.square().sum(), (x, *theirs.values()))]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other.reshape(one.shape), **FLOAT64)
    wrapped.merge()
    torch.testing.assert_close(ours.merged()["weight"], wrapped.base_layer.weight, **FLOAT64)
