"""Saving adapters to files and loading them, in every naming."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from library.base.errors import UserError
from library.checkpoints.files import load_state_dict
from library.checkpoints.hashes import sshs_hashes
from library.checkpoints.headers import read_metadata
from library.checkpoints.saving import save_safetensors
from networks.core.files.adapter_file import (
    COMPUTED,
    adapter_tensors,
    parse_adapter,
    read_adapter_file,
    require_layouts,
    save_adapter_file,
    sort_tensors,
)
from networks.core.files.module_weights import ModuleWeights
from networks.core.files.reading_writing import usable_modules
from networks.core.kinds import lora
from networks.core.network.network import AdapterNetwork
from networks.lora import create_network, create_network_from_weights
from tests.tolerances import EXACT, FLOAT64
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


# Adapter files in every naming are read into modules and written back.

PAIRS = {  # how one module is spelled: (lora_down's key, lora_up's key) -> its name
    ("lora_unet_a_b.lora_down.weight", "lora_unet_a_b.lora_up.weight"): "lora_unet_a_b",
    ("diffusion_model.a.b.lora_A.weight", "diffusion_model.a.b.lora_B.weight"): "diffusion_model.a.b",
    ("base_model.model.a.b.lora_A.weight", "base_model.model.a.b.lora_B.weight"): "base_model.model.a.b",
    ("unet.a.b.lora_A.my_cat.weight", "unet.a.b.lora_B.my_cat.weight"): "unet.a.b",
    ("unet.a.b.lora.down.weight", "unet.a.b.lora.up.weight"): "unet.a.b",
    ("text_encoder.a.q_proj.lora_linear_layer.down.weight", "text_encoder.a.q_proj.lora_linear_layer.up.weight"):
        "text_encoder.a.q_proj",
    ("unet.a.attn1.processor.to_out_lora.down.weight", "unet.a.attn1.processor.to_out_lora.up.weight"):
        "unet.a.attn1.to_out.0",
}  # fmt: skip


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("keys", "name"), PAIRS.items(), ids=lambda x: x if isinstance(x, str) else x[0])
def test_every_key_naming_is_read_as_one_module_and_written_back_unchanged(keys: tuple[str, str], name: str) -> None:
    down, up = randn(1, 3, 5), randn(2, 4, 3)
    tensors = {keys[0]: down, keys[1]: up}
    file = parse_adapter(tensors, {}, "cat.safetensors")
    (module,) = file.modules.values()
    assert (module.name, module.form, module.rank, module.shape) == (name, "low_rank", 3, (4, 5))
    torch.testing.assert_close(module.weight(torch.float64), up.double() @ down.double(), **FLOAT64)
    written = adapter_tensors(file)
    assert written.keys() == tensors.keys()
    assert torch.equal(written[keys[0]], down)


def test_alpha_6_at_rank_3_doubles_the_product_and_a_missing_alpha_does_not_scale_it() -> None:
    tensors = {"lora_unet_x.lora_down.weight": randn(3, 3, 5), "lora_unet_x.lora_up.weight": randn(4, 2, 3)}
    without = parse_adapter(tensors, {}, "").modules["lora_unet_x"]
    doubled = parse_adapter({**tensors, "lora_unet_x.alpha": torch.tensor(6)}, {}, "").modules["lora_unet_x"]
    assert (without.alpha, doubled.scale) == (3.0, 2.0)
    torch.testing.assert_close(doubled.weight(), 2 * without.weight(), **EXACT)


def test_tucker_core_is_the_sum_over_both_ranks() -> None:
    up, mid, down = randn(5, 6, 2, 1, 1), randn(6, 2, 2, 3, 3), randn(7, 2, 4, 1, 1)
    name = "lora_unet_x"
    tensors = {f"{name}.lora_up.weight": up, f"{name}.lora_mid.weight": mid, f"{name}.lora_down.weight": down}
    module = parse_adapter(tensors, {}, "").modules[name]
    expected = torch.einsum("op,pqhw,qi->oihw", up[:, :, 0, 0].double(), mid.double(), down[:, :, 0, 0].double())
    assert module.form == "tucker"
    torch.testing.assert_close(module.weight(torch.float64), expected, **FLOAT64)


def test_an_alpha_in_diffusers_metadata_is_applied() -> None:
    tensors = {"unet.a.to_q.lora_A.weight": randn(8, 4, 5), "unet.a.to_q.lora_B.weight": randn(9, 5, 4)}
    recorded = {"unet.lora_alpha": 8, "unet.r": 4, "unet.alpha_pattern": {"b.to_q": 2}}
    metadata = {"lora_adapter_metadata": json.dumps(recorded)}
    assert parse_adapter(tensors, metadata, "").modules["unet.a.to_q"].scale == 2


def test_an_alpha_pattern_with_alternatives_matches_the_end_of_a_path() -> None:
    tensors = {"unet.a.to_q.lora_A.weight": randn(8, 4, 5), "unet.a.to_q.lora_B.weight": randn(9, 5, 4)}
    recorded = {"unet.lora_alpha": 8, "unet.alpha_pattern": {"to_k|to_q": 2}}
    metadata = {"lora_adapter_metadata": json.dumps(recorded)}
    assert parse_adapter(tensors, metadata, "").modules["unet.a.to_q"].scale == 0.5


@pytest.mark.parametrize("value", [[], [True], "2", None, True, float("nan")])
def test_an_alpha_pattern_without_a_number_is_refused(value: object, tmp_path: Path) -> None:
    save_safetensors(tmp_path / "adapter_model.safetensors", {"base_model.model.q.lora_A.weight": randn(10, 4, 5)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 6, "alpha_pattern": {"q": value}}))
    with pytest.raises(UserError, match="is damaged: alpha_pattern has"):
        read_adapter_file(tmp_path / "adapter_model.safetensors")


def test_rslora_alpha_in_peft_settings_is_divided_by_the_square_root_of_the_rank(tmp_path: Path) -> None:
    tensors = {"base_model.model.q.lora_A.weight": randn(10, 4, 5), "base_model.model.q.lora_B.weight": randn(11, 5, 4)}
    save_safetensors(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 6, "use_rslora": True}))
    assert read_adapter_file(tmp_path / "adapter_model.safetensors").modules["base_model.model.q"].scale == 3


@pytest.mark.parametrize(
    ("leaves", "form"),
    [
        (("w_norm", "b_norm"), "norm"),
        (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "alpha"), "loha"),
        (("lokr_w1", "lokr_w2_a", "lokr_w2_b", "alpha"), "lokr"),
        (("diff", "diff_b"), "full"),
        (("weight", "on_input"), "ia3"),
        (("a1.weight", "a2.weight", "b1.weight", "b2.weight", "alpha"), "glora"),
        (("bias", "scalar"), "other"),
    ],
)
def test_kinds_without_low_rank_factors_are_recognised(leaves: tuple[str, ...], form: str) -> None:
    file = parse_adapter({f"lora_unet_x.{leaf}": torch.ones(1, 1) for leaf in leaves}, {}, "cat.safetensors")
    assert file.modules["lora_unet_x"].form == form
    with pytest.raises(ValueError, match=r"cat.safetensors: 1 modules cannot be merged, the first is lora_unet_x"):
        require_layouts(file, (lora.LAYOUT,), "merged")


def test_unusable_files_raise_errors_that_say_why() -> None:
    down, up = {"lora_unet_x.lora_down.weight": randn(12, 2, 5)}, {"lora_unet_x.lora_up.weight": randn(13, 4, 3)}
    with pytest.raises(ValueError, match=r"lora_down.weight without its up factor"):
        parse_adapter(down, {}, "half.safetensors")
    with pytest.raises(ValueError, match=r"up is \[4, 3\], down is \[2, 5\]"):
        parse_adapter({**down, **up}, {}, "odd.safetensors")
    with pytest.raises(UserError, match=r"has lora_unet_x\.diff_b without its diff; the file is incomplete"):
        parse_adapter({"lora_unet_x.diff_b": randn(14, 4)}, {}, "bias.safetensors")
    with pytest.raises(ValueError, match="no weights of an adapter"):
        parse_adapter({"model.diffusion_model.out.2.weight": up.popitem()[1]}, {}, "base.safetensors")
    with pytest.raises(ValueError, match=r"--model: no_such.safetensors does not exist"):
        read_adapter_file("no_such.safetensors", "--model")


UNUSABLE = {  # case -> tensors by leaf, and the expected message
    "two alphas": ({"alpha": torch.ones(2)}, "has lora_unet_x.alpha of the shape [2]; it needs one number"),
    "no alpha in it": ({"alpha": torch.ones(0)}, "has lora_unet_x.alpha of the shape [0], which is empty"),
    "rank 0": (
        {"lora_down.weight": torch.ones(0, 5), "lora_up.weight": torch.ones(4, 0)},
        "has lora_unet_x.lora_down.weight of the shape [0, 5], which is empty",
    ),
    "bytes": (
        {"lora_down.weight": torch.ones(3, 5, dtype=torch.int8)},
        "has lora_unet_x.lora_down.weight as int8, whole numbers whose scale it does not say",
    ),
    "magnitudes in bytes": (
        {"dora_scale": torch.ones(1, 5, dtype=torch.int8)},
        "has lora_unet_x.dora_scale as int8, whole numbers whose scale it does not say",
    ),
    "NaN": (
        {"lora_up.weight": torch.full((4, 3), torch.nan)},
        "cat.safetensors: lora_unet_x.lora_up.weight has 12 of 12 values that are not finite; the file is damaged",
    ),
    "infinite alpha": ({"alpha": torch.tensor(torch.inf)}, "lora_unet_x.alpha has 1 of 1 values that are not finite"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_tensors_are_named(case: str) -> None:
    """Both by tools, which read the whole file, and by a network, which gets the tensors."""
    leaves, message = UNUSABLE[case]
    intact = {"lora_down.weight": randn(41, 3, 5), "lora_up.weight": randn(42, 4, 3), "alpha": torch.tensor(2.0)}
    tensors = {f"lora_unet_x.{leaf}": tensor for leaf, tensor in {**intact, **leaves}.items()}
    for read in (
        lambda: parse_adapter(tensors, {}, "cat.safetensors"),
        lambda: usable_modules(sort_tensors(tensors, {}, "cat.safetensors")),
    ):
        with pytest.raises(UserError, match=re.escape(message)) as refused:
            read()
        assert str(refused.value).startswith("cat.safetensors")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_alpha_may_be_a_single_value_of_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    tensors = {"lora_unet_x.lora_down.weight": randn(43, 4, 5), "lora_unet_x.lora_up.weight": randn(44, 4, 4)}
    file = parse_adapter({**tensors, "lora_unet_x.alpha": torch.full(shape, 2.0)}, {}, "")
    assert file.modules["lora_unet_x"].scale == 0.5


@pytest.mark.parametrize("leaf", ["diff_b", "scalar", "bias_values"])
def test_leaves_that_a_kind_does_not_know_are_not_dropped_silently(leaf: str) -> None:
    tensors = {"lora_unet_x.lora_down.weight": randn(45, 3, 5), "lora_unet_x.lora_up.weight": randn(46, 4, 3)}
    file = parse_adapter({**tensors, f"lora_unet_x.{leaf}": torch.ones(4)}, {}, "cat.safetensors")
    with pytest.raises(
        UserError, match=rf"cat.safetensors has lora_unet_x.{leaf}, which is not understood beside LoRA"
    ):
        require_layouts(file, COMPUTED, "merged")


def test_alphas_of_removed_blocks_are_dropped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = {"lora_unet_x.lora_down.weight": randn(47, 3, 5), "lora_unet_x.lora_up.weight": randn(48, 4, 3)}
    save_safetensors(tmp_path / "a.safetensors", {**tensors, "lora_unet_y.alpha": torch.tensor(2.0)})
    file = read_adapter_file(tmp_path / "a.safetensors")
    assert file.modules.keys() == {"lora_unet_x"}
    assert "has 1 alphas without weights, such as lora_unet_y.alpha; they change nothing" in caplog.text


@pytest.mark.parametrize("axis", [0, 1])
def test_dora_merges_to_the_magnitudes_along_its_axis(axis: int) -> None:
    base, up, down = randn(14, 4, 3, 3, 3), randn(15, 4, 2, 1, 1), randn(16, 2, 3, 3, 3)
    magnitude = randn(17, *((4, 1, 1, 1) if axis == 0 else (1, 3, 1, 1))).abs()
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": magnitude}
    module = ModuleWeights("x", tensors, {})
    merged = module.merged(base, 1.0)
    norms = merged.transpose(0, axis).flatten(1).norm(dim=1)
    torch.testing.assert_close(norms, magnitude.flatten(), rtol=1e-5, atol=1e-6)
    directions = torch.nn.functional.cosine_similarity(
        merged.transpose(0, axis).flatten(1), (base + module.weight()).transpose(0, axis).flatten(1)
    )
    torch.testing.assert_close(directions, torch.ones_like(directions), rtol=1e-5, atol=1e-6)
    half = module.merged(base, 0.5)
    torch.testing.assert_close(half, (base + merged) / 2, rtol=1e-5, atol=1e-6)


def test_a_saved_file_has_the_hashes_of_its_tensors(tmp_path: Path) -> None:
    tensors = {"lora_unet_x.lora_down.weight": randn(18, 2, 5), "lora_unet_x.lora_up.weight": randn(19, 4, 2)}
    file = parse_adapter(tensors, {"ss_network_dim": "2", "sshs_model_hash": "old"}, "")
    save_adapter_file(tmp_path / "a.safetensors", file, torch.float16)
    metadata = read_metadata(tmp_path / "a.safetensors")
    hashes = sshs_hashes(load_state_dict(tmp_path / "a.safetensors"), metadata)
    assert (metadata["sshs_model_hash"], metadata["sshs_legacy_hash"]) == hashes


@settings(max_examples=25, deadline=None)
@given(
    rank=st.integers(1, 5), alpha=st.floats(0.125, 64), scale=st.floats(0.01, 8), is_conv=st.booleans(),
    has_alpha=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_new_factors_reproduce_the_change(
    rank: int, alpha: float, scale: float, is_conv: bool, has_alpha: bool, seed: int
) -> None:
    """This holds whether the file records alpha or not."""
    kernel = (3, 3) if is_conv else ()
    tensors = {
        "lora_down.weight": randn(seed, 2, 3, *kernel).double(),
        "lora_up.weight": randn(seed + 1, 4, 2, *(1,) * len(kernel)).double(),
    }
    if has_alpha:
        tensors["alpha"] = torch.tensor(alpha, dtype=torch.float64)
    up_OR, down_RN = randn(seed + 2, 4, rank).double(), randn(seed + 3, rank, 27 if is_conv else 3).double()
    module = ModuleWeights("x", tensors, {}).with_factors(up_OR, down_RN, scale)
    assert module.rank == rank
    assert ("alpha" in module.tensors) == has_alpha
    expected = (scale * up_OR @ down_RN).reshape(4, 3, *kernel)
    torch.testing.assert_close(module.weight(torch.float64), expected, rtol=1e-6, atol=1e-7)  # alpha is float32


def test_the_error_about_peft_biases_names_a_program_that_merges_them(tmp_path: Path) -> None:
    stem = "base_model.model.unet.x"
    tensors = {f"{stem}.lora_A.weight": torch.ones(2, 8), f"{stem}.lora_B.weight": torch.ones(8, 2)}
    save_safetensors(tmp_path / "cat.safetensors", {**tensors, f"{stem}.lora_B.bias": torch.ones(8)}, {})
    file = read_adapter_file(tmp_path / "cat.safetensors")
    with pytest.raises(UserError, match=r"lora_B\.bias\. PEFT trained them with lora_bias.*merge_and_unload"):
        require_layouts(file, COMPUTED, "merged")
