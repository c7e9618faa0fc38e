"""Adapter files in every naming are read into modules and written back."""

import json
import re
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
from tests.tolerances import EXACT, FLOAT64

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
