"""LoHa against LyCORIS: equal initial values, outputs, gradients, merged weights, norms and files."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks.core.changes.adapter import Adapter
from networks.core.changes.dora import Decompose
from networks.core.kinds.loha import LoHa
from tests.unit.networks.one_layer import adapter_on, module_of

loha: Any = pytest.importorskip("lycoris.modules.loha")

LAYERS = {
    "linear": (lambda: nn.Linear(40, 30), (2, 5, 40)),
    "1x1": (lambda: nn.Conv2d(40, 30, 1), (2, 40, 4, 4)),
    "3x3": (lambda: nn.Conv2d(11, 30, 3, stride=2, padding=1), (2, 11, 6, 6)),
}
CASES = [
    (name, rank, has_core, is_dora, has_scalar)
    for name in LAYERS
    for rank in (2, 9)  # computed as a product of two factors, and as a full matrix
    for has_core in (False, True)
    for is_dora in (False, True)
    for has_scalar in (False, True)
    if name == "3x3" or not has_core
]
CLOSE = {"rtol": 1e-3, "atol": 2e-4}  # LyCORIS sums in another order, in float32


def pair(name: str, rank: int, has_core: bool, is_dora: bool, has_scalar: bool) -> tuple[Adapter, Any, nn.Module]:
    """Return our adapter, LyCORIS's with the same weights, and the layer on which theirs is installed."""
    torch.manual_seed(1701 + CASES.index((name, rank, has_core, is_dora, has_scalar)))
    layer: Any = LAYERS[name][0]().requires_grad_(False)
    delta = LoHa(layer, rank, has_core)
    assert delta.is_narrow == (rank == 2)
    join = Decompose(layer.weight) if is_dora else None
    ours = adapter_on(layer, delta, 3.0, join, has_scalar=has_scalar)
    forms = {"use_tucker": has_core, "use_scalar": has_scalar, "weight_decompose": is_dora, "wd_on_out": False}
    theirs = loha.LohaModule("x", layer, 1.0, rank, 3.0, **forms)
    change = module_of(ours)
    with torch.no_grad():
        for parameter in change.parameters():
            parameter.copy_(parameter * 0.3 + torch.randn_like(parameter) * 0.3)
        for key, parameter in theirs.named_parameters():
            parameter.copy_(change.get_parameter(key))
    assert {k for k, _ in change.named_parameters()} == {k for k, _ in theirs.named_parameters() if "org" not in k}
    return ours, theirs, layer


@pytest.mark.parametrize(("name", "rank", "has_core", "is_dora", "has_scalar"), CASES)
def test_layer_merged_weight_and_file_match_lycoris(
    name: str, rank: int, has_core: bool, is_dora: bool, has_scalar: bool
) -> None:
    ours, theirs, layer = pair(name, rank, has_core, is_dora, has_scalar)
    x = torch.randn(LAYERS[name][1], requires_grad=True)
    keys = [key for key, _ in module_of(ours).named_parameters()]

    def run(module: nn.Module) -> tuple[Tensor, tuple[Tensor, ...]]:
        y = layer(x)
        grads = torch.autograd.grad(y.square().sum(), (x, *(module.get_parameter(key) for key in keys)))
        return y, grads

    alone = layer(x)
    ours.install()
    y, grads = run(module_of(ours))
    ours.remove()
    theirs.apply_to()
    their_y, their_grads = run(theirs)
    theirs.restore()
    torch.testing.assert_close(y, their_y, **CLOSE)
    assert (y - alone).abs().max() > 0.01
    for one, other in zip(grads, their_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-6)
    # Their get_merged_weight multiplies by alpha / rank a second time.
    assert isinstance(layer.weight, Tensor)
    merged = layer.weight + theirs.get_weight(layer.weight.shape) * theirs.scalar
    merged = theirs.apply_weight_decompose(merged) if is_dora else merged
    torch.testing.assert_close(ours.merged()["weight"], merged, **CLOSE)
    mine, other = ours.change.stored_tensors(), theirs.custom_state_dict()
    assert {key: tensor.shape for key, tensor in mine.items()} == {key: tensor.shape for key, tensor in other.items()}


@pytest.mark.parametrize("has_scalar", [False, True])
@pytest.mark.parametrize(("name", "has_core"), [("linear", False), ("3x3", False), ("3x3", True)])
def test_initial_values_equal_lycoris(name: str, has_core: bool, has_scalar: bool) -> None:
    layer: Any = LAYERS[name][0]()
    torch.manual_seed(1801)
    ours = module_of(adapter_on(layer, LoHa(layer, 4, has_core), 1.0, has_scalar=has_scalar))
    torch.manual_seed(1801)
    theirs = loha.LohaModule("x", layer, 1.0, 4, 1.0, use_tucker=has_core, use_scalar=has_scalar)
    for key, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(key)), key
