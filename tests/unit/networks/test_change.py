"""The interface of a change, tested with a multiplicative kind, and singular values from small factors."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from library.checkpoints.files import load_state_dict
from library.checkpoints.saving import save_safetensors
from networks.core.changes.adapter import Adapter
from networks.core.changes.change import Change, ChangeSize, Forward, Misfit
from networks.core.changes.dora import Decompose
from networks.core.changes.low_rank import LowRank
from networks.core.changes.svd import (
    balance,
    best_factors,
    clamp_factors,
    concatenate,
    rank_by_norm,
    rank_by_ratio,
    rank_by_sum,
    svd_of_product,
)
from networks.core.files.module_weights import ModuleWeights
from networks.core.files.reading_writing import network_tensors
from networks.core.registry import layouts
from networks.core.registry.key_layout import KeyLayout
from networks.core.targets.targets import TargetModule
from tests.tolerances import EXACT, FLOAT64
from tests.unit.networks.one_layer import adapter_on, double, module_of

LEAF = "toy_Q"


class Rotation(nn.Module):
    """y = R (W x) + b with R = (1 + Q) / (1 - Q), Q skew-symmetric: W is rotated, and no matrix is added to it."""

    fast_keys: frozenset[str] = frozenset()
    changed_parameters = ("weight",)
    size = ChangeSize()

    def __init__(self, layer: nn.Module | None, q_OO: Tensor) -> None:
        super().__init__()
        self.toy_Q = nn.Parameter(q_OO)
        object.__setattr__(self, "layer", layer)
        self.layer: Any

    def rotation(self, strength: float) -> Tensor:
        skew = strength * (self.toy_Q - self.toy_Q.t())
        identity = torch.eye(len(skew), dtype=skew.dtype)
        return torch.linalg.solve(identity - skew, identity + skew)

    def forward(self, x: Tensor, base: Forward, strength: float) -> Tensor:
        bias = 0 if self.layer.bias is None else self.layer.bias
        return (base(x) - bias) @ self.rotation(strength).t() + bias

    def merged(self, base: Tensor, strength: float = 1.0, parameter: str = "weight") -> Tensor:
        if len(base) != len(self.toy_Q):
            raise Misfit("", tuple(self.toy_Q.shape), tuple(base.shape))
        return (self.rotation(strength) @ base.flatten(1)).view_as(base)

    def norm(self) -> Tensor:
        return (self.toy_Q - self.toy_Q.t()).norm()

    @torch.no_grad()
    def scale_(self, ratio: Tensor) -> None:
        self.toy_Q.mul_(ratio)

    def stored_tensors(self) -> Mapping[str, Tensor]:
        return self.state_dict()

    def load(self, leaves: Mapping[str, Tensor]) -> None:
        self.load_state_dict(dict(leaves))


def read(leaves: Mapping[str, Tensor], layer: nn.Module | None) -> Change:
    return Rotation(layer, leaves[LEAF])


ROTATION = KeyLayout(name="rotation", words="a rotation", needs=(LEAF,), read=read, may_have=())


def rotated(seed: int) -> tuple[nn.Linear, Adapter]:
    torch.manual_seed(seed)
    layer = nn.Linear(7, 5).requires_grad_(False)
    adapter = Adapter(TargetModule("lora_unet_x", "x", layer, "plain"), Rotation(layer, torch.randn(5, 5) * 0.3), 1.0)
    layer.double()
    return layer, double(adapter)


@pytest.mark.parametrize("multiplier", [1.0, 0.4, 0.0])
def test_an_installed_rotation_computes_what_the_merged_weight_computes(multiplier: float) -> None:
    layer, adapter = rotated(4001)
    adapter.multiplier = multiplier
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    alone, weight = layer(x), adapter.merged()["weight"]
    adapter.install()
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias), **FLOAT64)
    assert ((layer(x) - alone).abs().max() > 0.1) == (multiplier > 0)
    torch.testing.assert_close(weight.norm(dim=0), layer.weight.norm(dim=0), **FLOAT64)  # columns keep their length
    if multiplier:
        (grad,) = torch.autograd.grad(layer(x).square()[:, 0].sum(), adapter.change.toy_Q)  # type: ignore[attr-defined]
        assert grad.abs().max() > 0
    adapter.remove()
    assert torch.equal(layer(x), alone)


def test_its_file_is_read_through_the_layout_table_and_merged_as_by_the_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, adapter = rotated(4011)
    save_safetensors(tmp_path / "x.safetensors", network_tensors({"lora_unet_x": adapter}, None), {})
    leaves = {key.partition(".")[2]: t for key, t in load_state_dict(tmp_path / "x.safetensors").items()}
    assert leaves.keys() == {LEAF} and layouts.recognise_layout(leaves).name == "other"
    layouts_with_rotation = (*layouts.list_layouts(), ROTATION)
    monkeypatch.setattr(layouts, "list_layouts", lambda: layouts_with_rotation)
    module = ModuleWeights("lora_unet_x", leaves, {})
    assert module.layout is ROTATION and not module.is_low_rank
    assert module.changes("weight") and not module.changes("bias")
    adapter.multiplier = 0.4
    merged = module.merged(layer.weight, 0.4, torch.float64)
    torch.testing.assert_close(merged, adapter.merged()["weight"], **FLOAT64)
    with pytest.raises(ValueError, match=r"lora_unet_x changes a weight of the shape \[5, 5\]"):
        module.merged(torch.zeros(6, 7), 1.0)


def test_a_norm_limit_reduces_the_rotation() -> None:
    _, adapter = rotated(4021)
    before = adapter.change.norm()
    adapter.change.scale_(torch.tensor(0.25))
    assert math.isclose(adapter.change.norm().item(), before.item() / 4, rel_tol=1e-12)


# Buffers of a delta


class Masked(LowRank):
    """A kind of a third party whose delta has buffers of its own: two in files, one that is computed again."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__(layer, rank)
        self.register_buffer("levels", torch.linspace(0, 1, rank))
        self.register_buffer("seed", torch.tensor(31))
        self.register_buffer("scratch", torch.zeros(rank), persistent=False)

    def up_factor(self) -> Tensor:
        levels = self.get_buffer("levels")
        return super().up_factor() * levels


@pytest.mark.parametrize("is_decomposed", [False, True])
def test_the_buffers_of_a_delta_are_saved_moved_and_loaded(tmp_path: Path, is_decomposed: bool) -> None:
    layer = nn.Linear(6, 5)
    join = Decompose(layer.weight) if is_decomposed else None
    adapter = adapter_on(layer, Masked(layer, 4), 2.0, join)
    change = module_of(adapter)
    assert {"levels", "seed"} < change.state_dict().keys() and "scratch" not in change.state_dict()
    with torch.no_grad():
        change.lora_up.weight.normal_()
    save_safetensors(tmp_path / "a.safetensors", network_tensors({"x": adapter}, None))
    stored = load_state_dict(tmp_path / "a.safetensors")
    other = adapter_on(layer, Masked(layer, 4), 2.0, join)
    module_of(other).levels.zero_()
    other.change.load({key.removeprefix("x."): tensor for key, tensor in stored.items()})
    for module in (change, module_of(other)):
        module.double()
        assert module.delta.levels is module.levels and module.levels.dtype == torch.float64
        assert module.delta.seed is module.seed and module.seed.dtype == torch.int64
    assert torch.equal(other.change.weight(), change.weight()) and change.weight().any()


# Singular values computed from small factors equal those of the full matrix.


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(o=st.integers(1, 12), n=st.integers(1, 12), r=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_decomposition_of_a_product_equals_that_of_the_full_matrix(o: int, n: int, r: int, seed: int) -> None:
    up, down = randn(seed, o, r), randn(seed + 1, r, n)
    u, s, v = svd_of_product(up, down)
    torch.testing.assert_close(u * s @ v, up @ down, **FLOAT64)
    full = torch.linalg.svdvals(up @ down)[: len(s)]
    torch.testing.assert_close(s[: len(full)], full, rtol=1e-8, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(o=st.integers(1, 10), n=st.integers(1, 10), rank=st.integers(1, 10), seed=st.integers(0, 2**31))
def test_best_factors_miss_only_the_smallest_singular_values(o: int, n: int, rank: int, seed: int) -> None:
    matrix = randn(seed, o, n)
    up, down = best_factors(matrix, rank)
    missed = torch.linalg.svdvals(matrix)[rank:].norm()
    assert up.shape[1] == down.shape[0] == min(rank, o, n)
    torch.testing.assert_close((matrix - up @ down).norm(), missed, rtol=1e-6, atol=1e-7)


def test_best_factors_of_a_zero_matrix_are_zero() -> None:
    up, down = best_factors(torch.zeros(4, 3, dtype=torch.float64), 2)
    assert not (up.any() or down.any())


def test_balanced_factors_have_equal_norms_and_the_best_product() -> None:
    u, s, v = svd_of_product(randn(1, 8, 5), randn(2, 5, 7))
    up, down = balance(u, s, v, 3)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1), **FLOAT64)
    torch.testing.assert_close(up @ down, u[:, :3] * s[:3] @ v[:3], **FLOAT64)


def test_concatenated_factors_multiply_to_the_sum() -> None:
    factors = [(randn(3, 6, 2), randn(4, 2, 5)), (randn(5, 6, 3), randn(6, 3, 5))]
    up, down = concatenate(factors, [0.5, -2.0])
    assert down.shape == (5, 5)
    expected = 0.5 * factors[0][0] @ factors[0][1] - 2 * factors[1][0] @ factors[1][1]
    torch.testing.assert_close(up @ down, expected, **FLOAT64)


S = torch.tensor([8.0, 4.0, 2.0, 1.0])


@pytest.mark.parametrize(("most", "rank"), [(1.5, 1), (2.5, 2), (4.1, 3), (100, 4), (8, 3), (1, 1)])
def test_ratio_keeps_values_above_the_largest_over_it(most: float, rank: int) -> None:
    assert rank_by_ratio(S, most) == rank


@pytest.mark.parametrize(("share", "rank"), [(0.1, 1), (8 / 15 + 1e-3, 2), (12 / 15, 2), (0.9, 3), (0.99, 4), (1.0, 4)])
def test_sum_keeps_the_share_of_15(share: float, rank: int) -> None:
    assert rank_by_sum(S, share) == rank


@pytest.mark.parametrize(("share", "rank"), [((64 / 85) ** 0.5 - 1e-3, 1), ((64 / 85) ** 0.5 + 1e-3, 2), (1.0, 4)])
def test_norm_keeps_the_share_of_the_root_of_85(share: float, rank: int) -> None:
    assert rank_by_norm(S, share) == rank


def test_clamping_limits_the_largest_fifth() -> None:
    up, down = clamp_factors(torch.tensor([1.0, -9.0, 3.0]), torch.tensor([4.0, 5.0]), 0.8)
    torch.testing.assert_close(torch.cat([up, down]), torch.tensor([1.0, -4.0, 3.0, 4.0, 4.0]), **EXACT)
