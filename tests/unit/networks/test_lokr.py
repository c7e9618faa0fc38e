"""networks.lokr in a complete network: names, files, loading, memory, refusals."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.checkpoints.saving import save_safetensors
from networks import loha, lokr, lora
from networks.core.changes.dora import Decompose
from networks.core.changes.dropout import Dropout
from networks.core.files.adapter_file import read_adapter_file
from networks.core.kinds.loha import LoHa
from networks.core.kinds.lokr import LoKr
from networks.core.network.network import AdapterNetwork
from tests.tolerances import FLOAT32_SAME_MATH, FLOAT64
from tests.unit.networks.one_layer import adapter_on, double, module_of
from tests.unit.networks.test_dora import Largest
from tests.unit.networks.test_forms import LINEAR, assert_same, outputs, perturb
from tests.unit.networks.toy import toy_models

PRODUCTS = [(False, True), (True, False), (True, True), (False, False)]  # w1, w2 made of factors


def trained(seed: int, **args: str) -> tuple[AdapterNetwork, Any, Any]:
    """Return an installed network with random weights, and its models."""
    text, unet = toy_models(seed)
    network = lokr.create_network(1.0, 1, 2.0, None, text, unet, **args)
    perturb(network, seed + 1)
    network.apply_to(text, unet)
    return network, text, unet


@pytest.mark.parametrize("is_dora", [False, True])
@pytest.mark.parametrize(
    ("layer_kind", "make"),
    [
        *(
            (kind, partial(LoKr, rank=2, outer=(5, 4), is_product=p, has_core=kind == "core"))
            for kind in ("linear", "3x3", "core")
            for p in PRODUCTS
            if kind != "core" or p[1]
        ),
        *(("linear", partial(LoHa, rank=rank)) for rank in (2, 9)),
    ],
)
def test_output_and_gradients_match_the_full_matrix(layer_kind: str, make: Any, is_dora: bool) -> None:
    torch.manual_seed(4031)
    layer: Any = nn.Linear(40, 30) if layer_kind == "linear" else nn.Conv2d(40, 30, 3, stride=2, padding=1)
    layer.double().requires_grad_(False)
    adapter = double(adapter_on(layer, make(layer), 3.0, Decompose(layer.weight) if is_dora else None))
    perturb(module_of(adapter), 4032)
    shape = (3, 40) if layer_kind == "linear" else (2, 40, 5, 5)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    learned = (x, *module_of(adapter).parameters())
    full = adapter.merged()["weight"]
    if layer_kind == "linear":
        expected = nn.functional.linear(x, full, layer.bias)
    else:
        expected = nn.functional.conv2d(x, full, layer.bias, 2, 1)
    expected_grads = torch.autograd.grad(expected.square().sum(), learned)
    adapter.install()
    y = layer(x)
    torch.testing.assert_close(y, expected, **FLOAT64)
    for actual, expected_grad in zip(torch.autograd.grad(y.square().sum(), learned), expected_grads, strict=True):
        torch.testing.assert_close(actual, expected_grad, **FLOAT64)


@pytest.mark.parametrize(
    ("make", "most", "is_dora"),
    [
        *((partial(LoKr, rank=2, outer=(8, 8), is_product=p), 2, False) for p in PRODUCTS),
        *((partial(LoHa, rank=4), 16, is_dora) for is_dora in (False, True)),  # the products of ranks times outputs
    ],
)
def test_neither_pass_creates_a_tensor_as_large_as_the_weight(make: Any, most: int, is_dora: bool) -> None:
    layer = nn.Linear(96, 128).requires_grad_(False)
    adapter = adapter_on(layer, make(layer), 2.0, Decompose(layer.weight) if is_dora else None)
    adapter.install()
    x = torch.randn(2, 96, requires_grad=True)
    with Largest() as largest:
        layer(x).square().sum().backward()
    assert 0 < largest.num_values <= most * 128


def test_alpha_applies_only_if_there_is_a_rank() -> None:
    layer = nn.Linear(12, 12)
    for is_product in PRODUCTS:
        change = module_of(adapter_on(layer, LoKr(layer, 2, (3, 3), is_product), 6.0))
        assert change.scale == (3.0 if any(is_product) else 1.0)
        change.load({**change.stored_tensors(), "alpha": torch.tensor(8.0)})
        assert change.scale == (4.0 if any(is_product) else 1.0)


@pytest.mark.parametrize("is_product", [(False, True), (True, False)])
@pytest.mark.parametrize("is_conv", [False, True])
def test_rank_dropout_drops_ranks_per_sample(is_product: tuple[bool, bool], is_conv: bool) -> None:
    torch.manual_seed(4041)
    layer: Any = nn.Conv2d(12, 12, 3, padding=1) if is_conv else nn.Linear(12, 12)
    adapter = adapter_on(layer, LoKr(layer, 2, (3, 4), is_product), 2.0, drops=Dropout(rank=0.5))
    change = module_of(adapter).train()
    perturb(change, 4042)
    x = torch.randn((40, 12, 3, 3) if is_conv else (40, 5, 12))
    base = layer(x)
    factor = "lokr_w2_a" if is_product[1] else "lokr_w1_a"
    full, halves = change.get_parameter(factor).detach().clone(), []
    change.eval()
    for keep in ([0, 0], [1, 0], [0, 1], [1, 1]):
        with torch.no_grad():
            change.get_parameter(factor).copy_(full * torch.tensor(keep))
        halves.append((change.forward(x, layer, 1.0) - base) * 2)  # the rest is scaled by 1 / (1 - 0.5)
    with torch.no_grad():
        change.get_parameter(factor).copy_(full)
    change.train()
    dropped = change.forward(x, layer, 1.0) - base
    distances = torch.stack([(dropped - half).flatten(1).norm(dim=1) for half in halves])
    assert distances.min(0).values.max() < 1e-4
    assert set(distances.argmin(0).tolist()) == {0, 1, 2, 3}


def test_a_factor_that_differs_from_the_file_is_named_with_a_fix(tmp_path: Path) -> None:
    path = str(tmp_path / "x.safetensors")
    network, text, unet = trained(4081, full_matrix="True", factor="2")
    network.save_weights(path, None, {})
    network.remove()
    with pytest.raises(ValueError, match=r"with these --network_args it needs .*add --dim_from_weights"):
        lokr.create_network(1.0, 1, 2.0, None, text, unet, full_matrix="True", factor="1").load_weights(path)
    with pytest.raises(ValueError, match=r"made of lokr_w1 and lokr_w2 in .*add --dim_from_weights"):
        lokr.create_network(1.0, 1, 2.0, None, text, unet, factor="2").load_weights(path)


def test_arguments_that_lokr_does_not_take_are_refused() -> None:
    text, unet = toy_models(4091)
    with pytest.raises(ValueError, match="split_qkv does not work with this --network_module: all rows"):
        lokr.create_network(1.0, 3, 2.0, None, text, unet, split_qkv="True")
    with pytest.raises(ValueError, match=r"--network_args factor=0: expected a whole number from 1, or -1"):
        lokr.create_network(1.0, 3, 2.0, None, text, unet, factor="0")


def test_lokr_arguments_are_ignored_with_a_warning_in_other_network_modules(caplog: pytest.LogCaptureFixture) -> None:
    text, unet = toy_models(4101)
    loha.create_network(1.0, 3, 2.0, None, text, unet, factor="2")
    assert "--network_args factor has no effect; it belongs to networks.lokr" in caplog.text


def test_an_argument_that_full_matrix_overrides_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    lokr.create_network(1.0, 3, 2.0, None, *toy_models(4102), full_matrix="1", decompose_both="1")
    assert "decompose_both has no effect with full_matrix" in caplog.text


def test_modules_without_a_rank_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        network = trained(4111, full_matrix="True")[0]
    num = len(network.adapters)
    assert f"LoKr: {num} of {num} modules are two whole matrices" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{LINEAR}.lokr_w2_b"), "without its lokr_w2_b; the file is incomplete"),
        (lambda t: t.pop(f"{LINEAR}.lokr_w1"), "without lokr_w1, or lokr_w1_a and lokr_w1_b"),
        (lambda t: t.update({f"{LINEAR}.lokr_w2": torch.ones(6, 8)}), "two forms of the same matrix"),
        (lambda t: t.update({f"{LINEAR}.lokr_w2_b": torch.ones(2, 8)}), "do not fit together"),
        (lambda t: t.update({f"{LINEAR}.lokr_w1": torch.ones(3)}), "do not fit together: lokr_w1 is [3]"),
        (lambda t: t.update({f"{LINEAR}.lokr_t1": torch.ones(1, 1)}), "which no known LoKr has"),
    ],
)
def test_inconsistent_files_raise_errors_that_say_why(tmp_path: Path, change: Any, message: str) -> None:
    network = trained(4121, factor="1")[0]
    tensors: dict[str, Tensor] = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
    change(tensors)
    save_safetensors(tmp_path / "x.safetensors", tensors, {})
    with pytest.raises(ValueError, match=re.escape(message)):
        read_adapter_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize("way", ["settings", "file", "merged", "merged by networks.lora"])
def test_a_full_matrix_of_a_1x1_convolution_may_lack_its_kernel_dimensions(tmp_path: Path, way: str) -> None:
    """Some programs omit the 1x1 kernel dimensions of lokr_w2."""
    name = "lora_unet_mid_attention_proj_in"
    network, text, unet = trained(4141, full_matrix="True", factor="2")
    expected = outputs(text, unet, 4142)
    network.remove()
    tensors: dict[str, Tensor] = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
    assert tensors[f"{name}.lokr_w2"].shape == (4, 3, 1, 1)
    tensors[f"{name}.lokr_w2"] = tensors[f"{name}.lokr_w2"].flatten(1)
    path = str(tmp_path / "x.safetensors")
    save_safetensors(Path(path), tensors, {})
    network_module: Any = lora if way.endswith("lora") else lokr
    if way.startswith("merged"):
        second, weights = network_module.create_network_from_weights(1.0, path, None, text, unet, for_inference=True)
        second.merge_to(text, unet, weights, torch.float32, "cpu")
    else:
        if way == "file":
            second, _ = lokr.create_network_from_weights(1.0, path, None, text, unet)
        else:
            second = lokr.create_network(1.0, 1, 2.0, None, text, unet, full_matrix="True", factor="2")
        second.apply_to(text, unet)
        second.load_weights(path)
    assert_same(outputs(text, unet, 4142), expected)
    merged = read_adapter_file(Path(path)).modules[name].merged(torch.zeros(8, 6, 1, 1), 1.0)
    change: Any = network.adapters[name].change
    torch.testing.assert_close(merged, change.weight(), **FLOAT32_SAME_MATH)
