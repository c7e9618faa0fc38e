"""Adapter files converted from one naming to another and back."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from library.architectures.sd.layers import NAMES
from library.checkpoints.adapter_names import BaseNames, FileNaming, ModuleNames
from networks.core.changes.parameter_keys import ALPHA, DORA_SCALE, DOWN, UP
from networks.core.files.adapter_file import AdapterFile, adapter_tensors, parse_adapter
from networks.core.files.module_weights import ModuleWeights
from networks.core.files.renaming import Renamed, fold_scale, list_some_keys, rename

LINEAR = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
POINT = "lora_unet_mid_block_attentions_0_proj_in"
CONV = "lora_unet_up_blocks_2_resnets_1_conv1"
CLIP = "lora_te_text_model_encoder_layers_3_self_attn_out_proj"
NORM = "lora_unet_down_blocks_0_resnets_0_norm1"
NAMED = {
    "kohya": (LINEAR, POINT, CONV, CLIP),
    "generic": (
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q",
        "diffusion_model.middle_block.1.proj_in",
        "diffusion_model.output_blocks.7.0.in_layers.2",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.3.self_attn.out_proj",
    ),
    "diffusers": (
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.mid_block.attentions.0.proj_in",
        "unet.up_blocks.2.resnets.1.conv1",
        "text_encoder.text_model.encoder.layers.3.self_attn.out_proj",
    ),
}


def module(
    name: str, rank: int, alpha: float, kernel: tuple[int, ...], dtype: torch.dtype, seed: int
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, 5, *kernel, generator=generator).to(dtype)
    up = torch.randn(7, rank, *(1,) * len(kernel), generator=generator).to(dtype)
    return {f"{name}.alpha": torch.tensor(alpha), f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}


def four_modules(rank: int, alpha: float, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Return a Linear, a 1x1 and a 3x3 convolution of the U-Net and a Linear of the text encoder in kohya's naming."""
    kernels = ((), (1, 1), (3, 3), ())
    tensors: dict[str, Tensor] = {}
    for i, (name, kernel) in enumerate(zip(NAMED["kohya"], kernels, strict=True)):
        tensors |= module(name, rank, alpha, kernel, dtype, seed + i)
    return tensors


def renamed(tensors: Mapping[str, Tensor], to: FileNaming, drop: bool = False) -> Renamed:
    return rename(parse_adapter(tensors, {"ss_steps": "5"}, "x.safetensors"), NAMES, to, drop)


def changes(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """Return alpha / rank * up @ down of every module in float64, in an order that the namings share."""
    file = parse_adapter(tensors, {}, "x")
    modules = {names.kohya: m for m in file.modules.values() if (names := NAMES.find(m.name)) is not None}
    assert len(modules) == len(file.modules)
    return [modules[name].weight(torch.float64) for name in sorted(modules)]


@pytest.mark.parametrize("to", ["kohya", "generic", "diffusers"])
def test_modules_get_the_names_of_the_target_naming(to: FileNaming) -> None:
    file = renamed(four_modules(4, 2.0, torch.float32, 900), to).file
    assert tuple(file.modules) == NAMED[to]
    endings = {key[len(name) :] for name, m in file.modules.items() for key in m.keys.values()}
    expected = {".alpha", ".lora_down.weight", ".lora_up.weight"} if to == "kohya" else {
        ".lora_A.weight", ".lora_B.weight",
    }  # fmt: skip
    assert endings == expected


@pytest.mark.parametrize("to", ["generic", "diffusers"])
def test_kernels_keep_their_shape(to: FileNaming) -> None:
    tensors = adapter_tensors(renamed(four_modules(4, 2.0, torch.float32, 901), to).file)
    conv, point = NAMED[to][2], NAMED[to][1]
    assert tensors[f"{conv}.lora_A.weight"].shape == (4, 5, 3, 3)
    assert tensors[f"{conv}.lora_B.weight"].shape == (7, 4, 1, 1)
    assert tensors[f"{point}.lora_A.weight"].shape == (4, 5, 1, 1)


@settings(max_examples=40, deadline=None)
@given(
    to=st.sampled_from(["kohya", "generic", "diffusers"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    rank=st.integers(1, 6),
    alpha=st.one_of(st.integers(1, 64).map(float), st.floats(0.125, 16, width=16)),
    seed=st.integers(0, 10_000),
)
def test_a_round_trip_computes_the_same(to: FileNaming, dtype: torch.dtype, rank: int, alpha: float, seed: int) -> None:
    """Lossless if 1 / rank is exact; otherwise within float32 rounding, 2**-24 of each value."""
    before = four_modules(rank, alpha, dtype, seed)
    converted = adapter_tensors(renamed(before, to).file)
    back = adapter_tensors(renamed(converted, "kohya").file)
    assert back.keys() == before.keys()
    tolerance = 0.0 if dtype != torch.float32 and rank in (1, 2, 4) else 2**-22
    for changed, original in zip(changes(back), changes(before), strict=True):
        torch.testing.assert_close(changed, original, rtol=0, atol=tolerance * float(original.abs().max()) + 1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_power_of_two_is_folded_in_the_dtype_of_the_file(dtype: torch.dtype) -> None:
    before = four_modules(8, 1.0, dtype, 903)
    converted = renamed(before, "diffusers")
    assert converted.widened == () and {t.dtype for t in adapter_tensors(converted.file).values()} == {dtype}
    back = adapter_tensors(renamed(adapter_tensors(converted.file), "kohya").file)
    assert float(back[f"{LINEAR}.alpha"]) == 8
    assert torch.equal(back[f"{LINEAR}.lora_up.weight"] * 8, before[f"{LINEAR}.lora_up.weight"])
    assert torch.equal(back[f"{LINEAR}.lora_down.weight"], before[f"{LINEAR}.lora_down.weight"])


def test_a_scale_that_float16_would_round_is_folded_in_float32_exactly() -> None:
    up, down = torch.randn(7, 4).half(), torch.randn(4, 5).half()
    folded, same = fold_scale({"up": up, "down": down}, "up", 3 / 4).values()
    assert folded.dtype == same.dtype == torch.float32
    assert torch.equal(folded.double(), up.double() * 0.75) and torch.equal(same, down.float())


def test_a_power_of_two_that_float16_cannot_hold_is_folded_in_float32() -> None:
    up = torch.tensor([[6.1035e-05]]).half()  # the smallest normal number: a 1024th of it has no precision left
    folded, _ = fold_scale({"up": up * 1.5, "down": torch.ones(1, 1).half()}, "up", 2.0**-12).values()
    assert folded.dtype == torch.float32 and float(folded) == float(up) * 1.5 * 2.0**-12


def test_scale_one_leaves_the_factors_alone() -> None:
    up, down = torch.randn(7, 4).half(), torch.randn(4, 5).half()
    assert fold_scale({"up": up, "down": down}, "up", 1.0) == {"up": up, "down": down}


def test_renaming_kohya_to_kohya_changes_no_bit() -> None:
    before = four_modules(3, 1.7, torch.float16, 905)
    after = adapter_tensors(renamed(before, "kohya").file)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) and after[k].dtype == before[k].dtype for k in before)


def test_a_file_without_alpha_gets_its_rank() -> None:
    tensors = {"unet.mid_block.attentions.0.proj_in.lora_A.weight": torch.randn(6, 5, 1, 1)}
    tensors["unet.mid_block.attentions.0.proj_in.lora_B.weight"] = torch.randn(7, 6, 1, 1)
    assert float(adapter_tensors(renamed(tensors, "kohya").file)[f"{POINT}.alpha"]) == 6


def test_settings_that_record_alpha_in_metadata_are_applied_and_dropped() -> None:
    name = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{name}.lora_A.weight": torch.randn(6, 5, 1, 1), f"{name}.lora_B.weight": torch.randn(7, 6, 1, 1)}
    metadata = {"lora_adapter_metadata": '{"unet.lora_alpha": 3, "unet.r": 6}', "ss_steps": "5"}
    file = rename(parse_adapter(tensors, metadata, "x"), NAMES, "kohya").file
    assert float(adapter_tensors(file)[f"{POINT}.alpha"]) == 3
    assert file.metadata == {"ss_steps": "5"}


EXTRAS = {
    "lora_mid.weight": (f"{CONV}.lora_mid.weight", torch.ones(4, 4, 3, 3)),
    "dora_scale": (f"{LINEAR}.dora_scale", torch.ones(1, 5)),
    "w_norm": (f"{NORM}.w_norm", torch.ones(7)),
    "b_norm": (f"{NORM}.b_norm", torch.ones(7)),
    "a stranger": ("bundle_emb.cat.string_to_param", torch.ones(2)),
    "a module that SD 1.x lacks": ("lora_unet_down_blocks_9_conv.alpha", torch.ones(())),
    "an alpha alone": (f"{NORM}.alpha", torch.ones(())),
    "hada": (f"{NORM}.hada_w1_a", torch.ones(3, 3)),
    "lokr": (f"{NORM}.lokr_w1", torch.ones(3, 3)),
}


def with_extra(extra: str) -> tuple[dict[str, Tensor], str]:
    key, tensor = EXTRAS[extra]
    tensors = {**four_modules(4, 2.0, torch.float32, 906), key: tensor}
    if extra == "lora_mid.weight":
        tensors[f"{CONV}.lora_down.weight"] = torch.ones(4, 5, 1, 1)
    if extra == "lokr":
        tensors[f"{NORM}.lokr_w2"] = torch.ones(2, 2)
    if extra == "hada":
        tensors |= {f"{NORM}.hada_{leaf}": torch.ones(3, 3) for leaf in ("w1_b", "w2_a", "w2_b")}
    return tensors, key


@pytest.mark.parametrize("extra", EXTRAS)
def test_tensors_that_diffusers_cannot_hold_are_refused_or_dropped(extra: str) -> None:
    tensors, key = with_extra(extra)
    with pytest.raises(ValueError, match=rf"the diffusers naming has no place for .*{key}.*--drop_unsupported"):
        renamed(tensors, "diffusers")
    remaining = renamed(tensors, "diffusers", drop=True)
    assert key in remaining.dropped
    assert all("lora" in k for k in adapter_tensors(remaining.file))


@pytest.mark.parametrize("extra", ["dora_scale", "w_norm", "b_norm"])
def test_the_generic_and_kohya_namings_keep_extra_tensors(extra: str) -> None:
    tensors, key = with_extra(extra)
    converted = renamed(tensors, "generic")
    assert converted.dropped == ()
    back = adapter_tensors(renamed(adapter_tensors(converted.file), "kohya").file)
    assert back.keys() == tensors.keys() and torch.equal(back[key], tensors[key])


@pytest.mark.parametrize("extra", ["hada", "lokr", "lora_mid.weight"])
def test_the_kohya_naming_keeps_other_kinds(extra: str) -> None:
    tensors, key = with_extra(extra)
    after = adapter_tensors(renamed(tensors, "kohya").file)
    assert torch.equal(after[key], tensors[key])


def test_dropping_a_tucker_core_drops_its_module_and_no_other() -> None:
    tensors, _ = with_extra("lora_mid.weight")
    remaining = renamed(tensors, "generic", drop=True)
    assert set(remaining.dropped) == {k for k in tensors if k.startswith(CONV)}
    assert tuple(remaining.file.modules) == tuple(name for i, name in enumerate(NAMED["generic"]) if i != 2)


def test_dropping_magnitudes_keeps_the_factors() -> None:
    tensors, key = with_extra("dora_scale")
    remaining = renamed(tensors, "diffusers", drop=True)
    assert remaining.dropped == (key,) and tuple(remaining.file.modules) == NAMED["diffusers"]


def test_an_empty_result_is_an_error() -> None:
    with pytest.raises(ValueError, match="can hold none of its 1 modules"):
        renamed({f"{NORM}.w_norm": torch.ones(7), f"{NORM}.b_norm": torch.ones(7)}, "diffusers", drop=True)


def test_a_module_under_two_names_raises_an_error() -> None:
    tensors = four_modules(4, 2.0, torch.float32, 907)
    tensors["unet.mid_block.attentions.0.proj_in.lora_A.weight"] = torch.ones(4, 5, 1, 1)
    tensors["unet.mid_block.attentions.0.proj_in.lora_B.weight"] = torch.ones(7, 4, 1, 1)
    with pytest.raises(ValueError, match=r"module lora_unet_mid_block_attentions_0_proj_in twice"):
        renamed(tensors, "generic")


def test_magnitudes_of_peft_get_the_dimensions_of_the_weight() -> None:
    name = "unet.mid_block.attentions.0.proj_in"
    tensors = {f"{name}.lora_A.weight": torch.randn(6, 5, 1, 1), f"{name}.lora_B.weight": torch.randn(7, 6, 1, 1)}
    tensors[f"{name}.lora_magnitude_vector"] = torch.arange(7.0)
    after = adapter_tensors(renamed(tensors, "kohya").file)
    assert after[f"{POINT}.dora_scale"].shape == (7, 1, 1, 1)


def test_a_list_of_many_keys_shows_one_of_each_kind_first() -> None:
    many = [f"m{i}.lora_down.weight" for i in range(5)] + ["m0.dora_scale", "m1.dora_scale", "n.w_norm"]
    assert list_some_keys(many, limit=4) == (
        "8 keys: m0.lora_down.weight, m0.dora_scale, n.w_norm, m1.lora_down.weight and 4 more"
    )
    assert list_some_keys(many[:2], limit=4) == "m0.lora_down.weight, m1.lora_down.weight"


# Layers whose two halves are swapped in diffusers.

PAIR = ModuleNames("lora_unet_mod", "diffusion_model.mod", "transformer.norm.linear", swaps_pair=True)
TOY_NAMES = BaseNames("toy", (PAIR,))


def file(num_outputs: int) -> AdapterFile:
    g = torch.Generator().manual_seed(3)
    up, down = torch.randn(num_outputs, 2, generator=g), torch.randn(2, 5, generator=g)
    tensors = {UP: up, DOWN: down, ALPHA: torch.tensor(2.0)}
    module = ModuleWeights(PAIR.kohya, tensors, {leaf: f"{PAIR.kohya}.{leaf}" for leaf in tensors})
    return AdapterFile("a.safetensors", {PAIR.kohya: module}, {}, {})


def up_of(file: AdapterFile) -> torch.Tensor:
    (module,) = file.modules.values()
    return module.tensors[UP]


@pytest.mark.parametrize("naming", ["kohya", "generic"])
def test_only_diffusers_swaps_the_halves(naming: FileNaming) -> None:
    before = file(10)
    assert torch.equal(up_of(rename(before, TOY_NAMES, naming).file), up_of(before))
    converted = rename(before, TOY_NAMES, "diffusers").file
    assert torch.equal(up_of(converted), torch.cat([up_of(before)[5:], up_of(before)[:5]]))
    assert torch.equal(up_of(rename(converted, TOY_NAMES, "diffusers").file), up_of(converted)), (
        "they are swapped already"
    )
    assert torch.equal(up_of(rename(converted, TOY_NAMES, naming).file), up_of(before))


def test_magnitudes_of_the_rows_move_with_them() -> None:
    name = PAIR.diffusers
    up, down, sizes = torch.randn(10, 2), torch.randn(2, 5), torch.arange(10.0)
    theirs = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.lora_magnitude_vector": sizes}
    (converted,) = rename(parse_adapter(theirs, {}, "a.safetensors"), TOY_NAMES, "kohya").file.modules.values()
    assert torch.equal(converted.tensors[UP], torch.cat([up[5:], up[:5]]))
    assert converted.tensors[DORA_SCALE].flatten().tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]


def test_a_layer_of_more_parts_keeps_its_order() -> None:
    before = file(30)
    assert torch.equal(up_of(rename(before, TOY_NAMES, "diffusers").file), up_of(before))


KINDS = {
    "LoKr": {"lokr_w1": (2, 5), "lokr_w2": (5, 1)},
    "factorised LoKr": {"lokr_w1_a": (2, 3), "lokr_w1_b": (3, 5), "lokr_w2_a": (5, 3), "lokr_w2_b": (3, 1)},
    "LoKr with one row": {"lokr_w1": (1, 5), "lokr_w2_a": (10, 3), "lokr_w2_b": (3, 1)},
    "LoHa": {"hada_w1_a": (10, 3), "hada_w1_b": (3, 5), "hada_w2_a": (10, 3), "hada_w2_b": (3, 5)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_other_kinds_move_too(kind: str) -> None:
    generator = torch.Generator().manual_seed(5)
    theirs = {
        f"{PAIR.diffusers}.{leaf}": torch.randn(shape, generator=generator) for leaf, shape in KINDS[kind].items()
    }
    file = parse_adapter(theirs, {}, "a.safetensors")
    (before,), (after,) = file.modules.values(), rename(file, TOY_NAMES, "kohya").file.modules.values()
    weight = before.weight()
    torch.testing.assert_close(after.weight(), torch.cat([weight[5:], weight[:5]]))


def test_rows_that_cannot_be_swapped_are_named() -> None:
    """With an outer matrix of 5 rows the halves are not rows of either matrix."""
    theirs = {f"{PAIR.diffusers}.lokr_w1": torch.randn(5, 5), f"{PAIR.diffusers}.lokr_w2": torch.randn(2, 1)}
    with pytest.raises(ValueError, match=r"the halves of the rows of transformer\.norm\.linear have another order"):
        rename(parse_adapter(theirs, {}, "a.safetensors"), TOY_NAMES, "kohya")
