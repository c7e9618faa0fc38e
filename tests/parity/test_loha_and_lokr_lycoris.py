"""LoHa and LoKr against LyCORIS: equal initial values, outputs, gradients, merged weights and files."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks.core.changes.adapter import Adapter
from networks.core.changes.dora import Decompose
from networks.core.kinds.loha import LoHa
from networks.core.kinds.lokr import factorize, make_fresh
from networks.core.registry.layouts import make_change, recognise_layout
from tests.unit.networks.one_layer import adapter_on, module_of

loha: Any = pytest.importorskip("lycoris.modules.loha")
lokr: Any = pytest.importorskip("lycoris.modules.lokr")
general: Any = pytest.importorskip("lycoris.functional.general")

LAYERS = {
    "linear": (lambda: nn.Linear(48, 36), (2, 5, 48)),
    "1x1": (lambda: nn.Conv2d(48, 36, 1), (2, 48, 4, 4)),
    "3x3": (lambda: nn.Conv2d(24, 36, 3, stride=2, padding=1), (2, 24, 6, 6)),
}
FORMS: dict[str, dict[str, Any]] = {
    "w2 of factors": {"factor": 2},
    "both of factors": {"decompose_both": True},
    "w1 of factors": {"decompose_both": True, "factor": 12},
    "full": {"full_matrix": True, "factor": 4},
    "core": {"use_tucker": True, "factor": 2},
}
LOHA: dict[str, tuple[int, dict[str, Any]]] = {  # form -> rank and settings
    "loha of few ranks": (2, {}),  # computed as a product of two factors
    "loha": (9, {}),  # as a full matrix
    "loha core of few ranks": (2, {"use_tucker": True}),
    "loha core": (9, {"use_tucker": True}),
}
CASES = [
    (name, form, is_dora, has_scalar)
    for name in LAYERS
    for form in (*FORMS, *LOHA)
    for is_dora in (False, True)
    for has_scalar in (False, True)
    if "core" not in form or name == "3x3"
]
PLAIN = [(name, form) for name, form, is_dora, has_scalar in CASES if not is_dora and has_scalar]
CLOSE = {"rtol": 1e-3, "atol": 2e-4}  # LyCORIS sums in another order, in float32


def delta_of(layer: Any, form: str) -> Any:
    if form in LOHA:
        return LoHa(layer, LOHA[form][0], "core" in form)
    settings = FORMS[form]
    return make_fresh(
        layer, 2, settings.get("factor", -1), settings.get("decompose_both", False),
        settings.get("full_matrix", False), form == "core",
    )  # fmt: skip


def module_of_lycoris(layer: Any, form: str, alpha: float = 1.0, **more: Any) -> Any:
    if form in LOHA:
        return loha.LohaModule("x", layer, 1.0, LOHA[form][0], alpha, **LOHA[form][1], **more)
    return lokr.LokrModule("x", layer, 1.0, 2, alpha, **FORMS[form], **more)


def pair(name: str, form: str, is_dora: bool, has_scalar: bool) -> tuple[Adapter, Any, nn.Module]:
    """Return our adapter, LyCORIS's with the same weights, and the layer on which theirs is installed."""
    torch.manual_seed(2701 + CASES.index((name, form, is_dora, has_scalar)))
    layer: Any = LAYERS[name][0]().requires_grad_(False)
    delta = delta_of(layer, form)
    decomposition = Decompose(layer.weight) if is_dora else None
    ours = adapter_on(layer, delta, 3.0, decomposition, has_scalar=has_scalar)
    forms = {"use_scalar": has_scalar, "weight_decompose": is_dora, "wd_on_out": False}
    theirs = module_of_lycoris(layer, form, 3.0, **forms)
    change = module_of(ours)
    with torch.no_grad():
        for parameter in change.parameters():
            parameter.copy_(parameter * 0.3 + torch.randn_like(parameter) * 0.3)
        for key, parameter in theirs.named_parameters():
            parameter.copy_(change.get_parameter(key))
    assert {k for k, _ in change.named_parameters()} == {k for k, _ in theirs.named_parameters() if "org" not in k}
    return ours, theirs, layer


@pytest.mark.parametrize(("name", "form", "is_dora", "has_scalar"), CASES)
def test_layer_merged_weight_and_file_match_lycoris(name: str, form: str, is_dora: bool, has_scalar: bool) -> None:
    ours, theirs, layer = pair(name, form, is_dora, has_scalar)
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
    base = layer.weight
    assert isinstance(base, Tensor)
    # LyCORIS's forward pass with a scalar and DoRA, written out: W0 + scalar * dW, then the magnitudes.
    merged = base + theirs.get_weight(base.shape) * theirs.scalar
    merged = theirs.apply_weight_decompose(merged) if is_dora else merged
    theirs.apply_to()
    their_y, their_grads = run(theirs)
    theirs.restore()
    torch.testing.assert_close(y, their_y, **CLOSE)
    assert (y - alone).abs().max() > 1e-3
    for one, other in zip(grads, their_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-6)
    torch.testing.assert_close(ours.merged()["weight"], merged, **CLOSE)
    mine, other = ours.change.stored_tensors(), theirs.custom_state_dict()
    assert {key: tensor.shape for key, tensor in mine.items()} == {key: tensor.shape for key, tensor in other.items()}
    for key, tensor in other.items() if form in FORMS else ():
        if (
            key != "alpha" or not recognise_layout(mine).is_whole
        ):  # without a rank alpha has no meaning: LyCORIS stores the requested rank
            torch.testing.assert_close(mine[key], tensor.detach())


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, form in PLAIN if form in FORMS])
def test_files_compute_the_same_in_both_programs(name: str, form: str) -> None:
    ours, theirs, layer = pair(name, form, False, True)
    base = layer.weight
    assert isinstance(base, Tensor)
    merged = base + theirs.get_weight(base.shape) * theirs.scalar
    loaded = make_change({key: tensor.detach() for key, tensor in theirs.custom_state_dict().items()}, layer)
    torch.testing.assert_close(loaded.merged(base), merged, **CLOSE)
    leaves = ours.change.stored_tensors()
    again = lokr.LokrModule("x", layer, 1.0, 2, 3.0, **FORMS[form])
    again.load_state_dict(leaves)
    torch.testing.assert_close(base + again.get_weight(base.shape), merged, **CLOSE)
    if form in ("core", "w1 of factors"):  # LyCORIS's reader misreads the rank and form of these two
        return
    stored = [leaves.get(leaf) for leaf in lokr.LokrModule.weight_list]
    with torch.no_grad():
        again = lokr.LokrModule.make_module_from_state_dict("x", layer, *stored)
    torch.testing.assert_close(base + again.get_weight(base.shape), merged, **CLOSE)


@pytest.mark.parametrize(
    ("name", "form", "has_scalar"),
    [(*case, has_scalar) for case in PLAIN for has_scalar in (False, True) if case[1] in LOHA or not has_scalar],
)
def test_initial_values_equal_lycoris(name: str, form: str, has_scalar: bool) -> None:
    layer: Any = LAYERS[name][0]()
    torch.manual_seed(2801)
    ours = module_of(adapter_on(layer, delta_of(layer, form), 1.0, has_scalar=has_scalar))
    torch.manual_seed(2801)
    theirs = module_of_lycoris(layer, form, use_scalar=has_scalar)
    for key, parameter in ours.named_parameters():
        assert torch.equal(parameter, theirs.get_parameter(key)), key


def test_sizes_are_factorised_as_in_lycoris() -> None:
    sizes = (*range(1, 400), 512, 640, 768, 1000, 1280, 2048, 2560, 3072, 5120, 9216, 10240, 12288, 21504)
    for size in sizes:
        for factor in (-1, 1, 2, 3, 4, 5, 8, 12, 16, 30, 64):
            assert factorize(size, factor) == general.factorization(size, factor), (size, factor)
