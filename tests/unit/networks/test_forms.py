"""Tucker cores, trained scalars, DoRA and norms in a complete network: names, files, learning rates, refusals."""

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, layer_norm

from library.checkpoints.files import load_state_dict
from networks import dylora, lora_fa
from networks.core.changes.adapter import Adapter
from networks.core.kinds.norm import Norm, make_fresh_norm
from networks.core.network.network import AdapterNetwork
from networks.core.protocol import adopt
from networks.core.targets.targets import Part, TargetModule, find_norms
from networks.lora import create_network, create_network_from_weights
from tests.tolerances import FLOAT32_SAME_MATH, FLOAT64
from tests.unit.networks.one_layer import double, module_of
from tests.unit.networks.toy import toy_models

EVERYTHING = {
    "conv_dim": "3", "conv_alpha": "2", "use_tucker": "True", "use_scalar": "True", "train_norm": "True",
    "dora_wd": "True",
}  # fmt: skip
FORMS: dict[str, dict[str, str]] = {
    "plain": {},
    "tucker": {"conv_dim": "3", "use_tucker": "yes"},
    "scalar": {"use_scalar": "1"},
    "norms": {"train_norm": "true"},
    "dora": {"dora_wd": "True"},
    "dora per output": {"dora_wd": "True", "wd_on_output": "True"},
    "everything per output": {**EVERYTHING, "wd_on_out": "True"},
    "everything": EVERYTHING,
}
CONV, LINEAR, NORM = "lora_unet_mid_resnet_conv1", "lora_unet_mid_attention_to_q", "lora_unet_mid_attention_norm"
X_SHAPES = ((2, 3, 7), (1, 6, 4, 4))


def perturb(network: nn.Module, seed: int) -> None:
    """Perturb every parameter a little, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def trained(seed: int, **args: str) -> tuple[AdapterNetwork, Any, Any]:
    """Return an installed network with random weights, and its models."""
    text, unet = toy_models(seed)
    network = create_network(1.0, 4, 2.0, None, text, unet, **args)
    perturb(network, seed + 1)
    network.apply_to(text, unet)
    return network, text, unet


def outputs(text: nn.Module, unet: nn.Module, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [m(torch.randn(shape, generator=generator)) for m, shape in zip((text, unet), X_SHAPES, strict=True)]


def assert_same(got: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    for actual_part, expected_part in zip(got, expected, strict=True):
        torch.testing.assert_close(actual_part, expected_part, **(tolerance or FLOAT32_SAME_MATH))


def file_keys(network: AdapterNetwork, module: str) -> dict[str, list[int]]:
    return {leaf: list(tensor.shape) for leaf, tensor in network.adapters[module].change.stored_tensors().items()}


def test_keys_and_shapes_with_all_forms_combined() -> None:
    network, _, _ = trained(1501, **EVERYTHING)
    assert file_keys(network, CONV) == {
        "alpha": [],
        "dora_scale": [1, 6, 1, 1],
        "lora_down.weight": [3, 6, 1, 1],
        "lora_mid.weight": [3, 3, 3, 3],
        "lora_up.weight": [6, 3, 1, 1],
    }
    assert file_keys(network, LINEAR) == {
        "alpha": [],
        "dora_scale": [1, 8],
        "lora_down.weight": [4, 8],
        "lora_up.weight": [6, 4],
    }
    assert file_keys(network, NORM) == {"w_norm": [6], "b_norm": [6]}
    proj_in = file_keys(network, "lora_unet_mid_attention_proj_in")
    assert "lora_mid.weight" not in proj_in and proj_in["dora_scale"] == [1, 6, 1, 1]
    assert sum(isinstance(adapter.change, Norm) for adapter in network.adapters.values()) == 3
    assert "lora_te_norm" not in network.adapters  # it is in no searched block


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_magnitudes_are_saved_in_float32_whatever_the_precision(tmp_path: Path, precision: torch.dtype) -> None:
    network, _, _ = trained(1561, dora_wd="True")
    network.save_weights(str(tmp_path / "x.safetensors"), precision, {})
    tensors = load_state_dict(tmp_path / "x.safetensors")
    dtypes = {key.partition(".")[2]: tensor.dtype for key, tensor in tensors.items()}
    assert dtypes.pop("dora_scale") == torch.float32
    assert set(dtypes.values()) == {precision}


@pytest.mark.parametrize("wd_on_output", ["True", "False"])
def test_training_a_plain_lora_further_as_dora_starts_from_its_outputs(tmp_path: Path, wd_on_output: str) -> None:
    network, text, unet = trained(1571)
    expected = outputs(text, unet, 1572)
    network.save_weights(str(tmp_path / "x.safetensors"), None, {})
    network.remove()
    forms = {"dora_wd": "True", "wd_on_output": wd_on_output}
    second, _ = create_network_from_weights(1.0, str(tmp_path / "x.safetensors"), None, text, unet, **forms)
    second.apply_to(text, unet)
    second.load_weights(str(tmp_path / "x.safetensors"))
    assert "dora_scale" in dict(second.adapters[LINEAR].change.named_parameters())
    assert_same(outputs(text, unet, 1572), expected)


@pytest.mark.parametrize(
    ("in_file", "requested", "message"),
    [
        ({"conv_dim": "3", "use_tucker": "True"}, {"conv_dim": "3"}, "set --network_args use_tucker=True"),
        ({"conv_dim": "3"}, {"conv_dim": "3", "use_tucker": "True"}, "set --network_args use_tucker=False"),
        ({"dora_wd": "True"}, {}, "set --network_args dora_wd=True"),
        (
            {"dora_wd": "1"},
            FORMS["dora per output"],
            "each input (DoRA) in {file}; set --network_args wd_on_output=False",
        ),
        (
            FORMS["dora per output"],
            {"dora_wd": "1"},
            "each output (DoRA) in {file}; set --network_args wd_on_output=True",
        ),
    ],
)
def test_a_file_of_another_form_names_the_argument_to_set(
    tmp_path: Path, in_file: dict[str, str], requested: dict[str, str], message: str
) -> None:
    trained(1581, **in_file)[0].save_weights(str(tmp_path / "x.safetensors"), None, {})
    network = trained(1582, **requested)[0]
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message.format(file=tmp_path / "x.safetensors"))):
        network.load_weights(str(tmp_path / "x.safetensors"))
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())


def test_untrained_norms_in_a_file_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trained(1591, train_norm="True")[0].save_weights(str(tmp_path / "x.safetensors"), None, {})
    with caplog.at_level(logging.WARNING):
        trained(1592)[0].load_weights(str(tmp_path / "x.safetensors"))
    assert re.search(r"has weights for 3 modules such as lora_unet_down_0_attention_norm .* not used", caplog.text)


@pytest.mark.parametrize("leaf", ["lora_mid.weight", "dora_scale", "b_norm"])
def test_a_part_without_the_rest_of_its_module_is_named(tmp_path: Path, leaf: str) -> None:
    torch.save({**trained(1611)[0].state_dict(), f"lora_unet_other.{leaf}": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=re.escape(f"lora_unet_other has {leaf} alone; the file is incomplete")):
        trained(1612)[0].load_weights(str(tmp_path / "x.pt"))


def test_norms_use_the_learning_rate_of_their_block_and_rank_0_excludes_them() -> None:
    text, unet = toy_models(1631)
    network = create_network(
        1.0, 4, 2.0, None, text, unet, train_norm="1", down_lr_weight="0.5,1", mid_lr_weight="0", up_lr_weight="2"
    )
    norms = {m.adapter.target.path: m.settings for m in network.members if isinstance(m.adapter.change, Norm)}
    assert {path: settings.lr_factor for path, settings in norms.items()} == {
        "down.0.attention.norm": 1.0,
        "up.0.attention.norm": 2.0,
    }
    assert not [path for path in (m.adapter.target.path for m in network.members) if path.startswith("mid")]
    network = create_network(1.0, 4, 2.0, None, text, unet, train_norm="1", block_dims="0,4,0,4")
    norm_paths = [m.adapter.target.path for m in network.members if isinstance(m.adapter.change, Norm)]
    assert norm_paths == ["down.0.attention.norm", "up.0.attention.norm"]


def test_norms_can_be_trained_alone() -> None:
    text, unet = toy_models(1641)
    network = create_network(1.0, 0, 1.0, None, text, unet, train_norm="True")
    assert {key.partition(".")[2] for key in network.state_dict()} == {"w_norm", "b_norm"}
    assert network.apply_max_norm_regularization(1.0, "cpu") == (0, 0.0, 0.0)


NORM_LAYERS: dict[str, Any] = {
    "group": (lambda: nn.GroupNorm(3, 6), (2, 6, 4, 4)),
    "layer": (lambda: nn.LayerNorm(6), (2, 5, 6)),
    "layer without bias": (lambda: nn.LayerNorm(6, bias=False), (2, 5, 6)),
}


@pytest.mark.parametrize("name", NORM_LAYERS)
def test_a_norm_computes_with_the_sums_of_base_and_change(name: str) -> None:
    make, shape = NORM_LAYERS[name]
    torch.manual_seed(1651)
    layer = make().double().requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn_like(parameter))
    adapter = double(Adapter(TargetModule("x", "x", layer, "norm"), make_fresh_norm(layer), 0.6))
    assert (adapter.change.b_norm is None) == (layer.bias is None)
    perturb(module_of(adapter), 1652)
    x = torch.randn(shape, dtype=torch.float64)
    weight = layer.weight + 0.6 * adapter.change.w_norm
    bias = None if adapter.change.b_norm is None else layer.bias + 0.6 * adapter.change.b_norm
    expected = group_norm(x, 3, weight, bias) if name == "group" else layer_norm(x, (6,), weight, bias)
    alone = layer(x)
    adapter.install()
    torch.testing.assert_close(layer(x), expected, **FLOAT64)
    assert (expected - alone).abs().max() > 0.05
    adapter.remove()
    assert torch.equal(layer(x), alone) and "forward" not in vars(layer)


@pytest.mark.parametrize("name", NORM_LAYERS)
def test_a_small_change_of_a_16_bit_norm_is_not_rounded_away(name: str) -> None:
    make, shape = NORM_LAYERS[name]
    torch.manual_seed(1661)
    layer = make().requires_grad_(False).bfloat16()
    adapter = Adapter(TargetModule("x", "x", layer, "norm"), make_fresh_norm(layer), 1.0)
    adapter.change.w_norm.data.fill_(1e-3)  # bf16 has nothing between 1 and 1.0078
    x = torch.randn(shape).bfloat16()
    alone = layer(x)
    adapter.install()
    y = layer(x)
    assert y.dtype == torch.bfloat16 and not torch.equal(y, alone)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = layer(x)
    assert under_autocast.dtype == torch.bfloat16 and torch.equal(under_autocast, y)
    y.float().sum().backward()
    assert adapter.change.w_norm.grad is not None and adapter.change.w_norm.grad.dtype == torch.float32


def test_a_norm_is_trained_on_channels_last_inputs_without_gradients() -> None:
    torch.manual_seed(1665)
    layer = nn.GroupNorm(2, 8).requires_grad_(False)
    x = torch.randn(2, 8, 4, 4)
    grads = []
    for pixels in (x, x.contiguous(memory_format=torch.channels_last), x.clone().requires_grad_()):
        adapter = Adapter(TargetModule("x", "x", layer, "norm"), make_fresh_norm(layer), 1.0)
        adapter.install()
        layer(pixels).pow(3).sum().backward()
        adapter.remove()
        assert adapter.change.w_norm.grad is not None
        grads.append(adapter.change.w_norm.grad)
    torch.testing.assert_close(grads[1], grads[0], **FLOAT32_SAME_MATH)
    torch.testing.assert_close(grads[2], grads[0], **FLOAT32_SAME_MATH)


class Transformer2DModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.with_weights = nn.LayerNorm(4)
        self.without_weights = nn.LayerNorm(4, elementwise_affine=False)
        self.of_batches = nn.BatchNorm2d(4)


def test_only_affine_layer_norms_and_group_norms_are_adapted() -> None:
    part = Part("lora_unet", blocks=("Transformer2DModel",))
    model = nn.ModuleDict({"block": Transformer2DModel(), "outside": nn.LayerNorm(4)})
    assert [target.name for target in find_norms(part, model, part.blocks)] == ["lora_unet_block_with_weights"]


@pytest.mark.parametrize(
    ("argument", "needs"), [("use_tucker", "conv_dim"), ("dora_constant_norm", "dora_wd"), ("wd_on_output", "dora_wd")]
)
def test_an_argument_without_the_one_it_needs_is_ignored_with_a_warning(
    argument: str, needs: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        network = create_network(1.0, 4, 1.0, None, *toy_models(1671), **{argument: "True"})
    assert re.search(rf"{argument} has no effect without {needs}", caplog.text)
    assert network.state_dict().keys() == create_network(1.0, 4, 1.0, None, *toy_models(1671)).state_dict().keys()


def test_the_form_of_a_file_overrides_the_settings_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    weights = dict(trained(1681)[0].state_dict())
    with caplog.at_level(logging.WARNING):
        create_network_from_weights(
            1.0, "x", None, *toy_models(1682), weights, conv_dim="2", use_tucker="1", train_norm="1"
        )
    assert "from the file: conv_dim, use_tucker, train_norm has no effect" in caplog.text


def test_settings_of_dora_act_on_a_file_with_magnitudes_except_their_form(caplog: pytest.LogCaptureFixture) -> None:
    text, unet = toy_models(1683)
    weights = dict(create_network(1.0, 4, 1.0, None, text, unet, dora_wd="1").state_dict())
    with caplog.at_level(logging.WARNING):
        network, _ = create_network_from_weights(
            1.0, "x", None, text, unet, weights, dora_constant_norm="1", wd_on_output="1"
        )
    assert all(c.decomposition.has_constant_norm for c in network.changes())  # type: ignore[attr-defined]
    assert [record.message for record in caplog.records] == [
        "--dim_from_weights takes ranks, alphas and forms from the file: wd_on_output has no effect"
    ]


@pytest.mark.parametrize("network_module", [lora_fa, dylora])
def test_other_kinds_train_scalars_and_norms(network_module: Any, tmp_path: Path) -> None:
    text, unet = toy_models(1691)
    network = network_module.create_network(1.0, 4, 2.0, None, text, unet, use_scalar="True", train_norm="True")
    perturb(network, 1692)
    network.apply_to(text, unet)
    network.eval()
    expected = outputs(text, unet, 1693)
    network.save_weights(str(tmp_path / "x.safetensors"), None, {})
    network.remove()
    plain, _ = create_network_from_weights(1.0, str(tmp_path / "x.safetensors"), None, text, unet)
    plain.apply_to(text, unet)
    plain.load_weights(str(tmp_path / "x.safetensors"))
    assert_same(outputs(text, unet, 1693), expected)


@pytest.mark.parametrize(
    ("network_module", "form", "argument"),
    [(dylora, "dora", "dora_wd"), (dylora, "tucker", "use_tucker"), (lora_fa, "tucker", "use_tucker")],
)
def test_a_file_in_a_form_that_a_kind_cannot_train_is_refused_but_can_be_merged(
    network_module: Any, form: str, argument: str, tmp_path: Path
) -> None:
    network, text, unet = trained(1695, **FORMS[form])
    expected = outputs(text, unet, 1696)
    path = str(tmp_path / "x.safetensors")
    network.save_weights(path, None, {})
    network.remove()
    with pytest.raises(ValueError, match=rf"x\.safetensors was trained with {argument}, "):
        network_module.create_network_from_weights(1.0, path, None, text, unet)
    other, weights = network_module.create_network_from_weights(1.0, path, None, text, unet, for_inference=True)
    other.merge_to(text, unet, weights, torch.float32, "cpu")
    assert_same(outputs(text, unet, 1696), expected)


def test_dora_with_a_frozen_down_factor_trains_up_and_magnitudes() -> None:
    text, unet = toy_models(1701)
    network = lora_fa.create_network(1.0, 4, 2.0, None, text, unet, dora_wd="True")
    perturb(network, 1702)
    network.apply_to(text, unet)
    outputs(text, unet, 1703)[1].square().sum().backward()
    grads = {
        name for name, parameter in network.adapters[LINEAR].change.named_parameters() if parameter.grad is not None
    }
    assert grads == {"lora_up.weight", "dora_scale"}


@pytest.mark.parametrize("form", FORMS)
def test_norms_of_changes_are_limited_to_the_given_maximum(form: str) -> None:
    network, _, _ = trained(1711, **FORMS[form])
    modules = [a for a in network.adapters.values() if a.target.kind != "norm"]
    before = [adapter.change.weight().norm().item() for adapter in modules]
    untouched = {
        n: p.clone() for n, p in network.named_parameters() if "norm" in n or n.endswith(("dora_scale", "scalar"))
    }
    limit = sorted(before)[len(before) // 2] * 1.0001
    count, mean, maximum = adopt(network).limit_norms(limit, "cpu")
    after = [adapter.change.weight().norm().item() for adapter in modules]
    assert count == sum(norm > limit for norm in before) > 0
    assert after == pytest.approx([min(norm, limit) for norm in before], rel=1e-5)
    assert (mean, maximum) == (pytest.approx(sum(after) / len(after)), pytest.approx(limit))
    assert all(torch.equal(parameter, untouched[n]) for n, parameter in network.named_parameters() if n in untouched)
    assert adopt(network).limit_norms(limit, "cpu")[0] == 0  # a norm at the limit is not above it


def test_a_limit_on_norms_leaves_a_frozen_factor_alone() -> None:
    network = lora_fa.create_network(1.0, 4, 2.0, None, *toy_models(1721))
    perturb(network, 1722)
    adapter = network.adapters[LINEAR]
    assert isinstance(adapter, Adapter)
    down = adapter.change.state_dict()["lora_down.weight"].clone()
    network.apply_max_norm_regularization(0.01, "cpu")
    assert torch.equal(adapter.change.state_dict()["lora_down.weight"], down)
    assert adapter.change.weight().norm().item() == pytest.approx(0.01, rel=1e-5)


def test_the_log_reports_the_effect_of_each_argument(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        network, _, _ = trained(1731, **EVERYTHING, block_dims="0,2,4,4", conv_block_dims="0,3,0,3")
        network.prepare_optimizer_params(None, 1e-4, 2e-4)
    assert "text encoder 1: 2 modules adapted, rank 4, alpha 2, " in caplog.text
    assert re.search(
        r"denoiser: 11 modules adapted, rank 2, 3, 4, alpha 2, [\d,]+ parameters; DoRA in 11; a Tucker core in 2; "
        r"a trained strength in 11; 3 norms",
        caplog.text,
    )
    assert "  block 1: 4 modules, rank 2, 3, alpha 2" in caplog.text
    assert "  block 2: 3 modules, rank 4, alpha 2" in caplog.text
    assert re.search(r"learning rates: textencoder 0.0002 \(\d+ parameters\), unet 0.0001 \(", caplog.text)
