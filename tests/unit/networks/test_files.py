"""Saving adapters to files and loading them."""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from library.checkpoints.files import load_state_dict
from library.checkpoints.hashes import sshs_hashes
from library.checkpoints.headers import read_metadata
from networks.core.files.adapter_file import parse_adapter
from networks.core.network.network import AdapterNetwork
from networks.lora import create_network, create_network_from_weights
from tests.unit.networks.toy import randomize, toy_models


def trained(seed: int, rank: int = 4, alpha: float = 2.0, **args: str) -> AdapterNetwork:
    """An installed network with random weights."""
    text, unet = toy_models(seed)
    network = create_network(1.0, rank, alpha, None, text, unet, **args)
    randomize(network, seed + 1)
    network.apply_to(text, unet)
    return network


def test_a_saved_file_has_every_tensor_and_both_hashes(tmp_path: Path) -> None:
    network = trained(201)
    network.save_weights(str(tmp_path / "x.safetensors"), None, {"ss_steps": "5"})
    tensors = load_state_dict(tmp_path / "x.safetensors")
    state = network.state_dict()
    assert tensors.keys() == state.keys() and all(torch.equal(tensors[k], state[k]) for k in state)
    model_hash, legacy_hash = sshs_hashes(tensors, {"ss_steps": "5"})
    assert read_metadata(tmp_path / "x.safetensors") == {
        "ss_steps": "5",
        "sshs_model_hash": model_hash,
        "sshs_legacy_hash": legacy_hash,
    }


def test_save_precision_casts_every_tensor_including_alpha(tmp_path: Path) -> None:
    network = trained(202)
    network.save_weights(str(tmp_path / "x.safetensors"), torch.float16, {})
    tensors = load_state_dict(tmp_path / "x.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    key = "lora_unet_mid_attention_to_q.lora_up.weight"
    assert torch.equal(tensors[key], network.state_dict()[key].half())


@pytest.mark.parametrize("extension", ["ckpt", "pt"])
def test_other_extensions_are_pickled_state_dicts_without_metadata(tmp_path: Path, extension: str) -> None:
    network = trained(203)
    network.save_weights(str(tmp_path / f"x.{extension}"), None, {"ss_steps": "5"})
    content = torch.load(tmp_path / f"x.{extension}", weights_only=True)
    assert list(content) == list(network.state_dict())


def test_a_network_cast_to_bf16_saves_its_exact_alpha(tmp_path: Path) -> None:
    network = trained(204, alpha=0.1).to(torch.bfloat16)
    network.save_weights(str(tmp_path / "x.safetensors"), None, {})
    tensors = load_state_dict(tmp_path / "x.safetensors")
    assert float(tensors["lora_te_layers_0_q_proj.alpha"]) == pytest.approx(0.1, rel=1e-6)
    assert tensors["lora_te_layers_0_q_proj.lora_up.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("extension", ["safetensors", "ckpt"])
def test_a_loaded_file_computes_what_was_saved(tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"x.{extension}"
    text, unet = toy_models(205)
    first = create_network(1.0, 4, 2.0, None, text, unet, conv_dim="2")
    randomize(first, 206)
    first.apply_to(text, unet)
    x = torch.randn(1, 6, 4, 4)
    expected = unet(x)
    first.save_weights(str(path), None, {})
    first.remove()
    second = create_network(1.0, 4, 2.0, None, text, unet, conv_dim="2")
    second.apply_to(text, unet)
    assert not torch.allclose(unet(x), expected)
    second.load_weights(str(path))
    assert torch.equal(unet(x), expected)


def test_the_alpha_of_a_loaded_file_is_used_and_saved(tmp_path: Path) -> None:
    trained(207, alpha=8.0).save_weights(str(tmp_path / "x.safetensors"), None, {})
    network = trained(207, alpha=1.0)
    report = network.load_weights(str(tmp_path / "x.safetensors"))
    assert "alpha is 8 as in the file, not 1" in report
    assert {adapter.change.scale for adapter in network.adapters.values()} == {2.0}
    network.save_weights(str(tmp_path / "y.safetensors"), None, {})
    assert load_state_dict(tmp_path / "y.safetensors")["lora_te_layers_0_q_proj.alpha"] == 8


def without_alpha(network: AdapterNetwork) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in network.state_dict().items() if not key.endswith(".alpha")}


def test_a_file_without_alpha_has_the_rank_for_alpha(tmp_path: Path) -> None:
    torch.save(without_alpha(trained(208)), tmp_path / "x.pt")
    network = trained(209, alpha=1.0)
    network.load_weights(str(tmp_path / "x.pt"))
    assert {adapter.change.scale for adapter in network.adapters.values()} == {1.0}
    other, _ = create_network_from_weights(1.0, str(tmp_path / "x.pt"), None, *toy_models(210))
    assert {adapter.change.alpha_value for adapter in other.adapters.values()} == {4.0}


def test_keys_that_do_not_match_are_reported_and_the_rest_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = trained(211).state_dict()
    for key in [k for k in source if k.startswith("lora_te_layers_1")]:
        source[key.replace("lora_te_layers_1", "lora_te_layers_9")] = source.pop(key)
    torch.save(dict(source), tmp_path / "x.pt")
    network = trained(212)
    untouched = network.state_dict()["lora_te_layers_1_q_proj.lora_up.weight"].clone()
    with caplog.at_level(logging.WARNING):
        report = network.load_weights(str(tmp_path / "x.pt"))
    assert "7 modules loaded" in report
    assert "lacks lora_te_layers_1_q_proj; they start untrained" in caplog.text
    assert "has weights for lora_te_layers_9_q_proj, which this network does not train; not used" in caplog.text
    assert torch.equal(network.state_dict()["lora_te_layers_1_q_proj.lora_up.weight"], untouched)
    key = "lora_te_layers_0_q_proj.lora_up.weight"
    assert torch.equal(network.state_dict()[key], source[key])


def test_a_rank_mismatch_names_the_module_both_ranks_and_the_flag_and_changes_nothing(tmp_path: Path) -> None:
    torch.save(dict(trained(213, rank=6).state_dict()), tmp_path / "x.pt")
    network = trained(214, rank=4)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        network.load_weights(str(tmp_path / "x.pt"))
    for word in ("lora_te_layers_0_q_proj", "rank 6", "rank 4", "--dim_from_weights", "--network_dim=6", "x.pt"):
        assert word in str(caught.value)
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())


def test_a_file_for_another_base_model_is_refused(tmp_path: Path) -> None:
    source = dict(trained(215).state_dict())
    source["lora_te_layers_0_q_proj.lora_down.weight"] = torch.zeros(4, 9)
    torch.save(source, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=re.escape("has the shape [4, 9]") + ".*" + re.escape("needs [4, 7]")):
        trained(216).load_weights(str(tmp_path / "x.pt"))
    torch.save({k.replace("lora_", "lora_other_", 1): v for k, v in source.items()}, tmp_path / "y.pt")
    with pytest.raises(ValueError, match=r"no module of .*y\.pt belongs to this network: the file has 8 modules"):
        trained(217).load_weights(str(tmp_path / "y.pt"))


@pytest.mark.parametrize("leaf", ["lokr_w1", "hada_w1_a", "lora_A.weight"])
def test_a_file_of_another_kind_is_refused_naming_the_key_that_shows_it(tmp_path: Path, leaf: str) -> None:
    torch.save({**trained(218).state_dict(), f"lora_unet_mid_attention_to_q.{leaf}": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=re.escape(f"*.{leaf}")):
        trained(219).load_weights(str(tmp_path / "x.pt"))


def test_a_factor_without_its_partner_is_named(tmp_path: Path) -> None:
    source = dict(trained(220).state_dict())
    del source["lora_unet_mid_attention_to_q.lora_up.weight"]
    torch.save(source, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"lora_unet_mid_attention_to_q has .* belong together"):
        trained(221).load_weights(str(tmp_path / "x.pt"))


WRITTEN: dict[str, Callable[[str, Tensor], Tensor]] = {
    "Linear layers as 1x1 kernels": lambda leaf, t: t[..., None, None] if t.dim() == 2 else t,
    "kernels as matrices": lambda leaf, t: t.flatten(1) if t.dim() == 4 else t,
    "up factors as matrices": lambda leaf, t: t.flatten(1) if leaf == "lora_up.weight" and t.dim() == 4 else t,
}


@pytest.mark.parametrize("way", ["load_weights", "dim_from_weights", "merge"])
@pytest.mark.parametrize("written", WRITTEN)
def test_factors_with_other_dimensions_compute_the_same(tmp_path: Path, written: str, way: str) -> None:
    """Other layouts, programs without kernel dimensions and LyCORIS's DyLoRA write factors with other dimensions."""
    text, unet = toy_models(231)
    first = create_network(1.0, 4, 2.0, None, text, unet, conv_dim="2")
    randomize(first, 232)
    first.apply_to(text, unet)
    x = torch.randn(1, 6, 4, 4, generator=torch.Generator().manual_seed(233))
    expected = unet(x)
    tensors = {key: WRITTEN[written](key.partition(".")[2], t) for key, t in first.state_dict().items()}
    first.remove()
    torch.save(tensors, tmp_path / "x.pt")
    if way == "load_weights":
        second = create_network(1.0, 4, 2.0, None, text, unet, conv_dim="2")
    else:
        second, weights = create_network_from_weights(
            1.0, str(tmp_path / "x.pt"), None, text, unet, for_inference=way == "merge"
        )
    if way == "merge":
        second.merge_to(text, unet, weights, torch.float32, "cpu")
    else:
        second.apply_to(text, unet)
        second.load_weights(str(tmp_path / "x.pt"))
    torch.testing.assert_close(unet(x), expected, rtol=1e-5, atol=1e-6)
    for name, module in parse_adapter(tensors, {}, "x.pt").modules.items():
        weight = first.adapters[name].target.module.weight
        assert isinstance(weight, Tensor)
        plain = torch.zeros_like(weight)
        change = module.merged(plain, 1.0)
        torch.testing.assert_close(change, first.adapters[name].change.merged(plain), rtol=1e-5, atol=1e-6)


STRANGERS = {
    "a checkpoint": (
        ["model.diffusion_model.out.2.weight"], [], r"has no weights of an adapter \(first keys: model\.diff",
    ),
    "an embedding beside": (
        ["bundle_emb.cat.string_to_param.*"], ["lora_unet_mid_attention_to_q.alpha"],
        r"has 1 keys that are of no adapter, the first is bundle_emb\.cat.*--drop_unsupported",
    ),
    "another base model": (
        ["transformer.x.lora_A.weight", "transformer.x.lora_B.weight"], [],
        r"1 of its modules are not in this base model, the first is transformer\.x; was it made for another",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STRANGERS)
def test_files_that_are_not_adapters_of_this_base_model_are_refused_with_the_reason(tmp_path: Path, case: str) -> None:
    """The error must not claim that they were made by LyCORIS."""
    keys, more, message = STRANGERS[case]
    torch.save({key: torch.ones(2, 2) for key in keys} | {key: torch.ones(()) for key in more}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message) as refused:
        create_network_from_weights(1.0, str(tmp_path / "x.pt"), None, *toy_models(241))
    assert "lycoris" not in str(refused.value) and "x.pt" in str(refused.value)
