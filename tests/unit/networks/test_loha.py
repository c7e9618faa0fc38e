"""networks.loha in a complete network: names, files, loading, memory, refusals."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.checkpoints.files import load_state_dict, save_safetensors
from networks import loha
from networks.core.changes.dora import Decompose
from networks.core.kinds.loha import LoHa
from networks.core.network.network import AdapterNetwork
from tests.tolerances import FLOAT32_SAME_MATH, FLOAT64
from tests.unit.networks.one_layer import adapter_on, double, module_of
from tests.unit.networks.test_dora import Largest
from tests.unit.networks.test_forms import CONV, LINEAR, perturb
from tests.unit.networks.toy import toy_models

FORMS: dict[str, dict[str, str]] = {
    "plain": {},
    "conv": {"conv_dim": "2"},
    "core": {"conv_dim": "2", "use_tucker": "True"},
    "everything": {"conv_dim": "2", "use_tucker": "1", "use_scalar": "1", "train_norm": "1", "dora_wd": "1"},
    "per output": {"conv_dim": "2", "dora_wd": "1", "wd_on_output": "1"},
}


def trained(seed: int, **args: str) -> tuple[AdapterNetwork, Any, Any]:
    """Return an installed network with random weights, and its models."""
    text, unet = toy_models(seed)
    network = loha.create_network(1.0, 3, 2.0, None, text, unet, **args)
    perturb(network, seed + 1)
    network.apply_to(text, unet)
    return network, text, unet


def test_saved_keys_and_shapes() -> None:
    saved = trained(2001, conv_dim="2", use_tucker="True")[0].adapters
    assert {leaf: list(t.shape) for leaf, t in saved[LINEAR].change.stored_tensors().items()} == {
        "alpha": [], "hada_w1_a": [6, 3], "hada_w1_b": [3, 8], "hada_w2_a": [6, 3], "hada_w2_b": [3, 8],
    }  # fmt: skip
    assert {leaf: list(t.shape) for leaf, t in saved[CONV].change.stored_tensors().items()} == {
        "alpha": [], "hada_w1_a": [2, 6], "hada_w1_b": [2, 6], "hada_w2_a": [2, 6], "hada_w2_b": [2, 6],
        "hada_t1": [2, 2, 3, 3], "hada_t2": [2, 2, 3, 3],
    }  # fmt: skip


@pytest.mark.parametrize("is_dora", [False, True])
@pytest.mark.parametrize("rank", [2, 9])
def test_output_and_gradients_match_the_full_matrix(rank: int, is_dora: bool) -> None:
    torch.manual_seed(2031)
    layer = nn.Linear(40, 30).double().requires_grad_(False)
    adapter = double(adapter_on(layer, LoHa(layer, rank), 2.0, Decompose(layer.weight) if is_dora else None))
    perturb(module_of(adapter), 2032)
    x = torch.randn(3, 40, dtype=torch.float64, requires_grad=True)
    learned = (x, *module_of(adapter).parameters())
    expected = nn.functional.linear(x, adapter.merged()["weight"], layer.bias)
    expected_grads = torch.autograd.grad(expected.square().sum(), learned)
    adapter.install()
    y = layer(x)
    torch.testing.assert_close(y, expected, **FLOAT64)
    for actual, expected_grad in zip(torch.autograd.grad(y.square().sum(), learned), expected_grads, strict=True):
        torch.testing.assert_close(actual, expected_grad, **FLOAT64)


@pytest.mark.parametrize("is_dora", [False, True])
def test_at_a_small_rank_neither_pass_creates_a_tensor_as_large_as_the_weight(is_dora: bool) -> None:
    layer = nn.Linear(96, 128).requires_grad_(False)
    adapter = adapter_on(layer, LoHa(layer, 4), 2.0, Decompose(layer.weight) if is_dora else None)
    adapter.install()
    x = torch.randn(2, 96, requires_grad=True)
    with Largest() as largest:
        layer(x).square().sum().backward()
    assert 0 < largest.num_values <= 16 * 128  # the products of ranks times outputs


def test_norms_equal_those_of_the_changes_and_are_limited() -> None:
    network = trained(2061, **FORMS["core"])[0]
    changes: list[Any] = [adapter.change for adapter in network.adapters.values()]
    for change in changes:
        torch.testing.assert_close(change.norm(), change.weight().norm(), **FLOAT32_SAME_MATH)
    limit = 0.5 * max(change.norm().item() for change in changes)
    count, _, maximum = network.apply_max_norm_regularization(limit, "cpu")
    assert count > 0 and maximum <= limit * 1.0001
    assert max(change.weight().norm().item() for change in changes) == pytest.approx(limit, rel=1e-4)


def test_a_file_that_lacks_a_factor_is_named(tmp_path: Path) -> None:
    network, text, unet = trained(2081)
    tensors = {key: t.contiguous() for key, t in network.state_dict().items() if key != f"{LINEAR}.hada_w2_b"}
    save_safetensors(tmp_path / "x.safetensors", tensors, {})
    with pytest.raises(ValueError, match=re.escape(f"{LINEAR} has") + ".*the file is incomplete"):
        loha.create_network(1.0, 3, 2.0, None, text, unet).load_weights(str(tmp_path / "x.safetensors"))
    assert load_state_dict(tmp_path / "x.safetensors").keys() == tensors.keys()
