"""split_qkv: an adapter for each projection of a fused layer, saved in files that every program reads as plain LoRA."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from networks import dylora, lora, lora_fa
from networks.core.changes.qkv_split import SplitRank, expand, fold
from networks.core.network.network import AdapterNetwork
from tests.tolerances import FLOAT32_SAME_MATH
from tests.unit.networks.toy import randomize
from tests.unit.networks.toy_transformer import ToyTransformer, toy_transformer

X_BTC = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))


def trained(network_module: ModuleType, model: ToyTransformer, **arguments: str) -> AdapterNetwork:
    network: AdapterNetwork = network_module.create_network(1.0, 3, 2, None, None, model, split_qkv="True", **arguments)
    randomize(network, 7)
    network.apply_to(None, model, False, True)
    network.eval()
    return network


def test_expanding_puts_each_projection_on_its_own_columns_and_folding_reverses_it() -> None:
    up_OR = torch.arange(1.0, 11).view(5, 2)
    wide = expand(up_OR, (2, 3))
    assert torch.equal(wide[:2, :2], up_OR[:2]) and torch.equal(wide[2:, 2:], up_OR[2:])
    assert not wide[:2, 2:].any() and not wide[2:, :2].any()
    assert torch.equal(fold(wide, (2, 3)), up_OR)  # type: ignore[arg-type]
    wide[0, 3] = 1
    assert fold(wide, (2, 3)) is None
    assert fold(up_OR, (2, 4)) is None


def test_q_k_v_and_the_rest_are_split_and_other_layers_are_not() -> None:
    network = trained(lora, toy_transformer(0))
    widths = {
        name: adapter.change.delta.widths
        for name, adapter in network.adapters.items()
        if isinstance(adapter.change.delta, SplitRank)  # type: ignore[union-attr]
    }
    assert set(widths) == {
        *(f"lora_unet_doubles_{n}_attn_qkv" for n in range(2)),
        *(f"lora_unet_single_{n}_linear1" for n in range(3)),
    }
    assert set(widths.values()) == {(12, 12, 12), (12, 12, 12, 20)}


@pytest.mark.parametrize("network_module", [lora, lora_fa])
@pytest.mark.parametrize(
    "arguments", [{}, {"dora_wd": "True"}, {"dora_wd": "True", "wd_on_output": "True"}, {"use_scalar": "True"}], ids=str
)
def test_the_file_is_a_plain_lora_with_the_trained_strength(
    network_module: ModuleType, arguments: dict[str, str], tmp_path: Path
) -> None:
    model = toy_transformer(0)
    base = model(X_BTC)
    network = trained(network_module, model, **arguments)
    expected = model(X_BTC)
    assert (expected - base).abs().max() > 1e-2
    path = tmp_path / "split.safetensors"
    network.save_weights(str(path), None, {})
    file = load_file(path)
    assert file["lora_unet_doubles_0_attn_qkv.lora_up.weight"].shape == (36, 9)
    assert file["lora_unet_single_0_linear1.lora_down.weight"].shape == (12, 12)
    assert float(file["lora_unet_single_0_linear1.alpha"]) == 8  # 2 for each of four projections of rank 3
    plain_model = toy_transformer(0)
    plain, weights = lora.create_network_from_weights(1.0, str(path), None, None, plain_model)
    plain.apply_to(None, plain_model, False, True)
    plain.load_weights(str(path))
    torch.testing.assert_close(plain.eval() and plain_model(X_BTC), expected, **FLOAT32_SAME_MATH)
    merged_model = toy_transformer(0)
    merged, weights = lora.create_network_from_weights(1.0, str(path), None, None, merged_model, for_inference=True)
    merged.merge_to(None, merged_model, weights, torch.float32, "cpu")
    torch.testing.assert_close(merged_model(X_BTC), expected, rtol=1e-4, atol=1e-5)  # the whole weight is rebuilt


@pytest.mark.parametrize("from_weights", [False, True])
def test_the_file_loads_back_as_split(from_weights: bool, tmp_path: Path) -> None:
    model = toy_transformer(0)
    network = trained(lora, model)
    expected = model(X_BTC)
    path = tmp_path / "split.safetensors"
    network.save_weights(str(path), None, {})
    again_model = toy_transformer(0)
    if from_weights:
        reloaded, _ = lora.create_network_from_weights(1.0, str(path), None, None, again_model, split_qkv="True")
    else:
        reloaded = lora.create_network(1.0, 3, 2, None, None, again_model, split_qkv="True")
    reloaded.apply_to(None, again_model, False, True)
    reloaded.load_weights(str(path))
    assert {key: tensor.shape for key, tensor in reloaded.state_dict().items()} == {
        key: tensor.shape for key, tensor in network.state_dict().items()
    }
    torch.testing.assert_close(reloaded.eval() and again_model(X_BTC), expected, **FLOAT32_SAME_MATH)


def test_gradients_match_separate_layers() -> None:
    """Compare with explicit matrices: each projection's change is its own product."""
    model = toy_transformer(0)
    network = trained(lora, model)
    name = "lora_unet_doubles_0_attn_qkv"
    delta = network.adapters[name].change.delta  # type: ignore[union-attr]
    ups: list[Tensor] = [part.detach().requires_grad_() for part in delta.lora_up.weight.split(12)]
    downs: list[Tensor] = [part.detach().requires_grad_() for part in delta.lora_down.weight.split(3)]
    layer = model.doubles[0].attn_qkv
    expected = torch.cat([x @ (up @ down).T for x in [X_BTC] for up, down in zip(ups, downs, strict=True)], -1) * 2 / 3
    (expected + torch.nn.functional.linear(X_BTC, layer.weight, layer.bias)).square().sum().backward()
    layer(X_BTC).square().sum().backward()
    torch.testing.assert_close(delta.lora_up.weight.grad, torch.cat([u.grad for u in ups]), **FLOAT32_SAME_MATH)
    torch.testing.assert_close(delta.lora_down.weight.grad, torch.cat([d.grad for d in downs]), **FLOAT32_SAME_MATH)


def test_the_norm_limit_applies_to_split_modules() -> None:
    model = toy_transformer(0)
    network = trained(lora, model)
    network.apply_max_norm_regularization(0.01, "cpu")
    change = network.adapters["lora_unet_doubles_0_attn_qkv"].change.weight().detach()  # type: ignore[union-attr]
    assert float(change.norm()) == pytest.approx(0.01, rel=1e-4)


def test_dropouts_work_on_split_modules() -> None:
    model = toy_transformer(0)
    network = trained(lora, model, rank_dropout="0.5", dropout="0.3")
    network.train()
    torch.manual_seed(0)
    first = model(X_BTC)
    assert not torch.equal(first, model(X_BTC)) and first.isfinite().all()


def test_an_unsplit_file_cannot_be_trained_further_as_split(tmp_path: Path) -> None:
    model = toy_transformer(0)
    plain = lora.create_network(1.0, 9, 2, None, None, model)
    randomize(plain, 1)
    path = tmp_path / "plain.safetensors"
    plain.save_weights(str(path), None, {})
    split = lora.create_network(1.0, 3, 2, None, None, model, split_qkv="True")
    with pytest.raises(ValueError, match=r"one adapter for all 3 projections .* split_qkv=False"):
        split.load_weights(str(path))
    with pytest.raises(ValueError, match="leave split_qkv out to train it further as it is"):
        lora.create_network_from_weights(1.0, str(path), None, None, model, split_qkv="True")


def test_dylora_refuses_split_qkv() -> None:
    with pytest.raises(ValueError, match="split_qkv does not work with this --network_module: a file cut"):
        dylora.create_network(1.0, 3, 2, None, None, toy_transformer(0), split_qkv="True")
