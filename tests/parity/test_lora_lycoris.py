"""Adapted layers against LyCORIS: equal weights give equal outputs, gradients, merged weights and files."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks.core.changes.adapter import Adapter
from networks.core.changes.dora import Decompose
from networks.core.changes.low_rank import LowRank
from networks.core.changes.tucker import Tucker
from networks.core.targets.targets import adaptation_kind
from tests.unit.networks.one_layer import adapter_on

locon: Any = pytest.importorskip("lycoris.modules.locon")

LAYERS = {
    "linear": (lambda: nn.Linear(11, 6), (2, 5, 11)),
    "1x1": (lambda: nn.Conv2d(11, 6, 1), (2, 11, 4, 4)),
    "3x3": (lambda: nn.Conv2d(11, 6, 3, stride=2, padding=1), (2, 11, 6, 6)),
}
CASES = [
    (name, is_tucker, is_dora, has_scalar)
    for name in LAYERS
    for is_tucker in (False, True)
    for is_dora in (False, True)
    for has_scalar in (False, True)
    if name == "3x3" or not is_tucker
]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # LyCORIS rebuilds the weight in float32


def pair(name: str, is_tucker: bool, is_dora: bool, has_scalar: bool) -> tuple[Adapter, Any, nn.Module]:
    """Return our adapter, LyCORIS's with the same weights, and the layer on which theirs is installed."""
    torch.manual_seed(1401 + CASES.index((name, is_tucker, is_dora, has_scalar)))
    layer: Any = LAYERS[name][0]().requires_grad_(False)
    kind = adaptation_kind(layer)
    assert kind is not None
    delta = (Tucker if is_tucker else LowRank)(layer, 4)
    decomposition = Decompose(layer.weight) if is_dora else None
    ours = adapter_on(layer, delta, 3.0, decomposition, has_scalar=has_scalar)
    theirs = locon.LoConModule(
        "x", layer, 1.0, 4, 3.0, use_tucker=is_tucker, use_scalar=has_scalar, weight_decompose=is_dora, wd_on_out=False
    )
    with torch.no_grad():
        for parameter in ours.change.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for key, parameter in theirs.named_parameters():
            parameter.copy_(ours.change.get_parameter(key))
    assert {k for k, _ in ours.change.named_parameters()} == {k for k, _ in theirs.named_parameters() if "org" not in k}
    return ours, theirs, layer


@pytest.mark.parametrize(("name", "is_tucker", "is_dora", "has_scalar"), CASES)
def test_layer_outputs_and_gradients_match_lycoris(name: str, is_tucker: bool, is_dora: bool, has_scalar: bool) -> None:
    ours, theirs, layer = pair(name, is_tucker, is_dora, has_scalar)
    x = torch.randn(LAYERS[name][1], requires_grad=True)
    keys = [key for key, _ in ours.change.named_parameters()]

    def run(module: nn.Module) -> tuple[Tensor, tuple[Tensor, ...]]:
        y = layer(x)
        grads = torch.autograd.grad(y.square().sum(), (x, *(module.get_parameter(key) for key in keys)))
        return y, grads

    alone = layer(x)
    ours.install()
    y, grads = run(ours.change)
    ours.remove()
    theirs.apply_to()
    their_y, their_grads = run(theirs)
    theirs.restore()
    torch.testing.assert_close(y, their_y, **CLOSE)
    assert (y - alone).abs().max() > 0.01
    for one, other in zip(grads, their_grads, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    torch.testing.assert_close(ours.merged()["weight"], theirs.get_merged_weight()[0], **CLOSE)


@pytest.mark.parametrize(("name", "is_tucker", "is_dora", "has_scalar"), CASES)
def test_the_file_matches_lycoris(name: str, is_tucker: bool, is_dora: bool, has_scalar: bool) -> None:
    ours, theirs, _ = pair(name, is_tucker, is_dora, has_scalar)
    mine, other = ours.change.stored_tensors(), theirs.custom_state_dict()
    assert {key: tensor.shape for key, tensor in mine.items()} == {key: tensor.shape for key, tensor in other.items()}
    for key in mine:
        torch.testing.assert_close(mine[key], other[key].float(), rtol=0, atol=0)


@pytest.mark.parametrize(("name", "is_tucker"), [("linear", False), ("3x3", False), ("3x3", True)])
def test_the_update_norm_matches_lycoris(name: str, is_tucker: bool) -> None:
    ours, theirs, _ = pair(name, is_tucker, False, True)
    torch.testing.assert_close(ours.change.norm(), theirs.get_diff_weight()[0].norm(), **CLOSE)


@pytest.mark.parametrize("name", LAYERS)
def test_initial_values_with_a_trained_strength_match_lycoris(name: str) -> None:
    """The strength starts at 0 and `up` is initialised like `down`, so that the strength has a gradient at once."""
    torch.manual_seed(1461)
    layer: Any = LAYERS[name][0]()
    kind = adaptation_kind(layer)
    assert kind is not None
    ours = adapter_on(layer, LowRank(layer, 500), 1.0, has_scalar=True)
    theirs = locon.LoConModule("x", layer, 1.0, 500, 1.0, use_scalar=True)
    assert ours.change.scalar is not None and ours.change.scalar.item() == theirs.scalar.item() == 0.0
    for key in ("lora_up.weight", "lora_down.weight"):
        mine, other = ours.change.get_parameter(key), theirs.get_parameter(key)
        assert mine.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.01)
        assert mine.std().item() == pytest.approx(other.std().item(), rel=0.05)
