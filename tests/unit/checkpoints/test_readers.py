"""Which keys and names of adapter files each inference program uses."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from library.architectures.flux.layers import CHROMA_NAMES
from library.architectures.specs import list_specs
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.checkpoints.base_model_spec import PROGRAMS, BaseModelSpec
from library.checkpoints.compatibility import Reading, describe, problems, readings
from library.checkpoints.recognition import base_in_metadata, keys_of_text_encoders, recognise_adapter, require_spec
from library.checkpoints.saving import save_safetensors
from library.commands import adapter_files
from library.models.identify import find_spec
from networks.core.files.adapter_file import adapter_tensors, parse_adapter
from networks.core.files.foreign_names import add_model
from networks.core.files.renaming import to_saved_naming
from tests.recognising import base_of
from tests.tiny.bases import BASES
from tests.tiny.keys import Shapes, kohya, peft
from tests.tiny.lumina import full_block
from tests.tiny.sd import CLIP_LAYER, SD1_FF, SD1_UNET, clips


def usage_letters(shapes: Shapes) -> str:
    """Return one letter per program: A if it uses all keys, S some, N none."""
    return "".join(reading.amount[0].upper() for reading in readings(list_specs(), shapes, {}))


def reading_of(program: str, shapes: Shapes) -> Reading:
    return next(reading for reading in readings(list_specs(), shapes, {}) if reading.program == program)


NAMINGS = [case for base in BASES.values() for case in base.readers]  # a letter for each of PROGRAMS


@pytest.mark.parametrize(("expected", "shapes"), [case[1:] for case in NAMINGS], ids=[case[0] for case in NAMINGS])
def test_each_program_uses_the_expected_share_of_each_naming(expected: str, shapes: Shapes) -> None:
    assert usage_letters(shapes) == expected


@pytest.mark.parametrize("name", BASES)
def test_names_for_diffusers_are_compared_with_its_model(name: str) -> None:
    """Without a model of diffusers to compare with, a table must not claim names of its own for it."""
    base = BASES[name]
    denoiser = [module for module in base.spec.names.modules if module.kohya.startswith("lora_unet_")]
    claimed = [module.diffusers for module in denoiser if not module.is_in_diffusers(module.generic)]
    assert base.pairs or not (claimed or "diffusers" in base.spec.readers), (
        f"no pair shows that {claimed[:1]} are right"
    )


@pytest.mark.parametrize("name", BASES)
def test_each_program_that_reads_a_base_model_has_a_case_in_which_it_uses_keys(name: str) -> None:
    base = BASES[name]
    cases = [zip(PROGRAMS, letters, strict=True) for _, letters, _ in base.readers]
    assert base.spec.readers.keys() <= {program for case in cases for program, letter in case if letter != "N"}


NAME = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
LORA = kohya(SD1_UNET)
KINDS = [
    ("3x3 convolution", "AAAAA", {"lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": (4, 320, 3, 3),
                                  "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight": (320, 4, 1, 1)}),
    ("Tucker", "AAANS", LORA | {"lora_unet_mid_block_resnets_0_conv1.lora_mid.weight": (4, 4, 3, 3)}),
    ("DoRA per input", "AAASS", LORA | {f"{NAME}.dora_scale": (1, 768)}),
    ("DoRA per output", "NNNSS", LORA | {f"{NAME}.dora_scale": (320, 1)}),
    ("LoKr per output", "NNNNS", {f"{NAME}.lokr_w1": (4, 4), f"{NAME}.lokr_w2": (80, 192),
                                  f"{NAME}.dora_scale": (320, 1)}),
    ("norms", "AAANS", LORA | {"lora_unet_conv_norm_out.w_norm": (320,), "lora_unet_conv_norm_out.b_norm": (320,)}),
    ("half a norm", "AASNS", LORA | {"lora_unet_conv_norm_out.w_norm": (320,)}),
    ("norms of CLIP", "SAANS", LORA | {"lora_te_text_model_final_layer_norm.w_norm": (768,),
                                       "lora_te_text_model_final_layer_norm.b_norm": (768,)}),
    ("LoHa", "AAANA", {f"{NAME}.alpha": (), **{f"{NAME}.hada_w{i}_{x}": (4, 4) for i in (1, 2) for x in "ab"}}),
    ("LoHa with Tucker", "AAANN", {f"{NAME}.hada_t1": (4, 4, 3, 3), f"{NAME}.hada_w1_a": (4, 4)}),
    ("LoKr", "AAANA", {f"{NAME}.lokr_w1": (4, 4), f"{NAME}.lokr_w2_a": (4, 4), f"{NAME}.lokr_w2_b": (4, 4)}),
    ("OFT", "NNNNN", {f"{NAME}.oft_R.weight": (24, 496)}),
    ("BOFT", "NNNNN", {f"{NAME}.boft_R": (1, 192, 4, 4), f"{NAME}.boft_s": (320, 1)}),
    ("LoKr with Tucker", "SNANN", LORA | {f"{CONV}.lokr_w1": (4, 4), f"{CONV}.lokr_t2": (2, 2, 3, 3),
                                         f"{CONV}.lokr_w2_a": (2, 80), f"{CONV}.lokr_w2_b": (2, 80)}),
    ("GLoRA", "ANNNN", {f"{NAME}.a1.weight": (768, 4), f"{NAME}.a2.weight": (4, 768), f"{NAME}.b1.weight": (320, 4),
                        f"{NAME}.b2.weight": (4, 768), f"{NAME}.alpha": ()}),
    ("full", "ANNNN", {f"{CONV}.diff": (320, 320, 3, 3), f"{CONV}.diff_b": (320,)}),
    ("OFT of LyCORIS", "ANANN", {f"{NAME}.oft_blocks": (5, 64, 64)}),
    ("OFT of LyCORIS with a limit", "NNANN", {f"{NAME}.oft_blocks": (5, 64, 64), f"{NAME}.alpha": ()}),
    ("networks.oft", "NNANN", {f"{NAME.replace('lora_', 'oft_')}.oft_blocks": (5, 64, 64)}),
    ("scalar", "SSSNS", LORA | {f"{NAME}.scalar": ()}),
    ("conv_in", "AAAAS", LORA | kohya("unet.conv_in")),
    ("time embedding", "AAAAS", LORA | kohya("unet.time_embedding.linear_1")),
]  # fmt: skip


@pytest.mark.parametrize(("expected", "shapes"), [case[1:] for case in KINDS], ids=[case[0] for case in KINDS])
def test_each_program_uses_the_expected_share_of_each_kind_of_weights(expected: str, shapes: Shapes) -> None:
    assert usage_letters(shapes) == expected


@pytest.mark.parametrize(("alpha", "amount"), [(0.0, "all"), (0.1, "none")])
def test_comfyui_applies_oft_of_lycoris_unless_it_has_a_constraint(alpha: float, amount: str) -> None:
    """LyCORIS stores the constraint as alpha, 0 meaning none."""
    shapes: Shapes = {f"{NAME}.oft_blocks": (5, 64, 64), f"{NAME}.alpha": ()}
    assert readings(list_specs(), shapes, {}, {f"{NAME}.alpha": alpha})[0].amount == amount


def test_modules_that_the_base_model_lacks_are_used_by_no_program() -> None:
    unknown = kohya("unet.down_blocks.7.attentions.0.proj_in")
    for reading in readings(list_specs(), LORA | unknown, {}):
        assert reading.unused == tuple(unknown)
        assert reading.reasons == ("Stable Diffusion 1.x has no modules with some of the file's names",)


def test_diffusers_refuses_kohya_names_with_a_module_that_flux_lacks() -> None:
    block = kohya("unet.double_blocks.0.img_attn_qkv", 3072)
    assert reading_of("diffusers", block).amount == "all"
    assert reading_of("diffusers", block | kohya("unet.double_blocks.0.img_attn_nothing", 3072)).amount == "none"


def test_alphas_without_weights_are_unused_but_accepted_by_forge() -> None:
    names = [f"lora_unet_mid_block_resnets_{n}_conv{i}" for n in (0, 1) for i in (1, 2)]
    names += [f"lora_unet_down_blocks_{n}_resnets_{m}_conv{i}" for n in range(3) for m in (0, 1) for i in (1, 2)]
    lone: Shapes = {f"{name}.alpha": () for name in names}
    readings_by_program = {reading.program: reading for reading in readings(list_specs(), LORA | lone, {})}
    assert (
        readings_by_program["ComfyUI"].unused == readings_by_program["Forge"].unused == tuple(lone) and len(lone) == 16
    )
    assert readings_by_program["ComfyUI"].reasons == ("alphas without weights change nothing",)
    assert readings_by_program["diffusers"].reasons == ("it refuses a file with alphas that have no weights",)


def test_comfyui_ignores_chromas_approximator_under_diffusers_names() -> None:
    """ComfyUI uses all other modules of a full-size file."""
    shapes: Shapes = {}
    for module in CHROMA_NAMES.modules:
        names = [module.diffusers] if isinstance(module.diffusers, str) else [p.diffusers for p in module.pieces]
        for name in names:
            if re.match(r"transformer\.(single_)?transformer_blocks|.*distilled_guidance_layer", name):
                shapes |= peft(name, 3072)
    reading = reading_of("ComfyUI", shapes)
    assert (reading.num_used, reading.num_keys) == (836, 860)


def test_comfyui_ignores_only_the_attention_layers_of_diffusers_names() -> None:
    reading = reading_of("ComfyUI", peft(SD1_UNET) | peft(SD1_FF) | peft("text_encoder." + CLIP_LAYER.format(0)))
    assert reading.unused == tuple(peft(SD1_UNET)) and reading.inexact == ()


def test_stable_diffusion_cpp_applies_a_tucker_core_wrongly() -> None:
    reading = reading_of("stable-diffusion.cpp", LORA | {f"{NAME}.lora_mid.weight": (4, 4, 3, 3)})
    assert reading.unused == () and len(reading.inexact) == 4 and "Tucker" in reading.reasons[0]


def test_dora_per_output_is_applied_but_not_as_trained() -> None:
    reading = reading_of("Forge", LORA | {f"{NAME}.dora_scale": (320, 1)})
    assert reading.unused == () and len(reading.inexact) == 4 and "per output" in reading.reasons[0]


@pytest.mark.parametrize(("num_unknown", "amount"), [(12, "some"), (13, "none")])
def test_forge_refuses_more_than_12_unknown_keys(num_unknown: int, amount: str) -> None:
    extra = {f"{NAME}.extra_{i}": (1,) for i in range(num_unknown)}
    assert reading_of("Forge", LORA | extra).amount == amount


def test_diffusers_refuses_alpha_in_its_own_naming() -> None:
    reading = reading_of("diffusers", peft(SD1_UNET) | {f"{SD1_UNET}.alpha": ()})
    assert reading.amount == "none" and reading.reasons == ("it refuses .alpha in addition to lora_A and lora_B",)


def test_diffusers_refuses_a_mix_of_namings() -> None:
    reading = reading_of("diffusers", peft(SD1_UNET) | clips(kohya, "text_encoder."))
    assert reading.amount == "none" and "mixes" in reading.reasons[0]


def test_diffusers_refuses_the_final_layer_of_lumina_in_the_generic_naming() -> None:
    body, last = full_block("layers.0"), peft("diffusion_model.final_layer.linear", 2304)
    assert reading_of("diffusers", body).amount == "all"
    assert reading_of("diffusers", body | last).amount == "none"


@pytest.mark.parametrize("path", ["unet.img_in", "unet.time_in.in_layer", "unet.guidance_in.out_layer"])
def test_diffusers_ignores_the_input_layers_of_flux(path: str) -> None:
    reading = reading_of("diffusers", kohya("unet.double_blocks.0.img_attn_qkv", 3072) | kohya(path, 3072))
    assert reading.unused == tuple(kohya(path, 3072))


def test_diffusers_uses_flux_adapters_of_clip_but_not_of_t5() -> None:
    clip = {k.replace("lora_te_", "lora_te1_"): s for k, s in kohya("text_encoder." + CLIP_LAYER.format(0)).items()}
    t5 = {
        k.replace("lora_te_", "lora_te3_"): s for k, s in kohya("text_encoder.encoder.block.0.layer.0.q", 4096).items()
    }
    reading = reading_of("diffusers", kohya("unet.double_blocks.0.img_attn_qkv", 3072) | clip | t5)
    assert reading.unused == tuple(t5) and len(t5) == 3


@pytest.mark.parametrize(
    "path", ["img_in", "txt_in", "time_in.in_layer", "vector_in.out_layer", "guidance_in.in_layer"]
)
def test_stable_diffusion_cpp_ignores_the_input_layers_of_flux_in_kohya_names(path: str) -> None:
    block = kohya("unet.double_blocks.0.img_attn_qkv", 3072)
    assert reading_of("stable-diffusion.cpp", block | kohya(f"unet.{path}", 3072)).unused == tuple(
        kohya(f"unet.{path}", 3072)
    )
    block = peft("diffusion_model.double_blocks.0.img_attn.qkv", 3072)
    assert reading_of("stable-diffusion.cpp", block | peft(f"diffusion_model.{path}", 3072)).amount == "all"


T5 = "encoder.block.{}.layer.0.SelfAttention.q"


def t5_blocks(prefix: str) -> Shapes:
    """Return seven modules of T5 under diffusers' names: more unknown keys than Forge tolerates."""
    shapes: Shapes = {}
    for block in range(7):
        shapes |= peft(prefix + T5.format(block), 4096)
    return shapes


def test_comfyui_diffusers_and_forge_do_not_read_t5_of_flux_under_diffusers_names() -> None:
    denoiser = peft("transformer.single_transformer_blocks.0.attn.to_q", 3072)
    t5 = t5_blocks("text_encoder_2.")
    assert reading_of("ComfyUI", denoiser | t5).unused == tuple(t5)
    assert reading_of("diffusers", denoiser | t5).unused == tuple(t5)
    assert reading_of("Forge", denoiser | t5).amount == "none"


def test_comfyui_diffusers_and_forge_do_not_read_t5_of_sd3_under_diffusers_names() -> None:
    denoiser, t5 = peft("transformer.transformer_blocks.0.attn.to_q", 1536), t5_blocks("text_encoder_3.")
    assert reading_of("ComfyUI", denoiser | t5).unused == tuple(t5)
    assert reading_of("diffusers", denoiser | t5).unused == tuple(t5)
    assert reading_of("Forge", denoiser | t5).amount == "none"


TEXT_ONLY = clips(peft, "text_encoder.") | clips(peft, "text_encoder_2.", 1280)
BOTH_CLIPS = {f"lora_te{n}_{CLIP_LAYER.format(0).replace('.', '_')}.lora_down.weight": (4, 768) for n in (1, 2)}


@pytest.mark.parametrize("version", ["sdxl_base_v1-0", "5-medium"])
def test_forge_reads_files_of_text_encoders_only_under_diffusers_names(version: str) -> None:
    """With a denoiser in the same naming, Forge refuses the file because of the denoiser's keys."""
    amounts_by_program = {
        r.program: r.amount for r in readings(list_specs(), TEXT_ONLY, {"ss_base_model_version": version})
    }
    assert (
        amounts_by_program["Forge"] == "all"
        and amounts_by_program["ComfyUI"] == "all"
        and amounts_by_program["A1111-style"] == "none"
    )
    denoiser = {key for n in range(7) for key in peft(f"unet.down_blocks.1.attentions.{n}.proj_in", 640)}
    assert reading_of("Forge", TEXT_ONLY | dict.fromkeys(denoiser, (4, 640))).amount == "none"


@pytest.mark.parametrize(
    ("version", "shapes", "reason"),
    [
        (
            "5-medium",
            BOTH_CLIPS,
            "it does not read text encoder keys in the kohya naming",
        ),  # SD3's encoders, not SDXL's
        ("flux1", kohya("text_encoder." + T5.format(0), 4096), "it does not support LoRA for FLUX.1's T5"),
        ("lumina2", kohya("text_encoder.layers.0.self_attn.q_proj", 2304), "it does not read text encoder keys"),
        ("anima", kohya("text_encoder.layers.0.self_attn.q_proj", 1024), "it does not read text encoder keys"),
    ],
)
def test_metadata_names_the_base_model_of_files_of_text_encoders_only(
    version: str, shapes: Shapes, reason: str
) -> None:
    shapes = {key.replace("lora_te_encoder_block", "lora_te3_encoder_block"): shape for key, shape in shapes.items()}
    (reading,) = (
        r for r in readings(list_specs(), shapes, {"ss_base_model_version": version}) if r.program == "diffusers"
    )
    assert reading.amount == "none" and reading.reasons[0].startswith(reason)


HUNYUAN = peft("diffusion_model.double_blocks.0.img_attn.qkv", 48)


@pytest.mark.parametrize(
    ("key", "value", "is_recognised"),
    [
        ("ss_base_model_version", "hunyuan-image-2.1", True),
        ("modelspec.architecture", "hunyuan-image-2.1/lora", True),
        ("modelspec.architecture", "anima-preview/lora", False),  # its names differ from these
        ("modelspec.architecture", "something-else/lora", False),
    ],
)
def test_metadata_distinguishes_base_models_with_the_same_names(key: str, value: str, is_recognised: bool) -> None:
    spec = recognise_adapter(list_specs(), HUNYUAN, {key: value})
    assert spec is not None and spec.name == ("hunyuan_image" if is_recognised else "flux")


WRITTEN = {base.spec.name: base.written for base in BASES.values()} | {
    "any_pipeline": ("any_pipeline", "AuraFlowPipeline")
}


@pytest.mark.parametrize("spec", list_specs(), ids=lambda spec: spec.name)
def test_the_base_model_is_recognised_from_either_metadata_field(spec: BaseModelSpec) -> None:
    version, architecture = WRITTEN[spec.name]
    assert base_in_metadata(list_specs(), {"ss_base_model_version": version}) is spec
    assert base_in_metadata(list_specs(), {"modelspec.architecture": f"{architecture}/lora"}) is spec


@pytest.mark.parametrize(("version", "name"), [("flux_2_klein_4b", "flux_2"), ("5-medium", "sd3"), ("sd_v1", "sd1")])
def test_the_release_in_the_metadata_may_vary(version: str, name: str) -> None:
    spec = base_in_metadata(list_specs(), {"ss_base_model_version": version})
    assert spec is not None and spec.name == name


def test_denoiser_keys_take_precedence_over_the_metadata() -> None:
    shapes = peft("diffusion_model.blocks.0.cross_attn.q_proj", 2048)
    assert readings(list_specs(), shapes, {"ss_base_model_version": "flux1"}) == readings(list_specs(), shapes, {})


def test_stable_diffusion_cpp_ignores_q_k_v_of_the_text_encoder_of_sd2() -> None:
    out = "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"
    reading = reading_of(
        "stable-diffusion.cpp", kohya(SD1_UNET, 1024) | kohya("text_encoder." + CLIP_LAYER.format(0), 1024) | kohya(out)
    )
    assert reading.unused == tuple(kohya("text_encoder." + CLIP_LAYER.format(0)))


def test_a_program_that_does_not_support_the_base_model_is_reported() -> None:
    reading = reading_of("Forge", peft("diffusion_model.layers.0.attention.qkv", 2304))
    assert reading.reasons == ("it supports no adapters of Lumina Image 2.0",)


def test_peft_names_are_read_by_no_program() -> None:
    assert usage_letters(peft(f"base_model.model.{SD1_UNET}")) == "NNNNN"


def test_the_summary_groups_programs_by_the_keys_they_use() -> None:
    line = describe(readings(list_specs(), peft(SD1_UNET) | peft(SD1_FF), {}))
    assert line == "all used by diffusers, stable-diffusion.cpp; some by ComfyUI (2 of 4); none by Forge, A1111-style"


def test_the_summary_for_an_unknown_base_model_says_so() -> None:
    assert readings(list_specs(), {"x.lora_A.weight": (4, 4)}, {}) == ()
    assert describe(()) == "its base model cannot be recognised from its keys"


def test_reasons_are_listed_once_with_the_program() -> None:
    results = readings(list_specs(), LORA | {f"{NAME}.dora_scale": (1, 768)}, {})
    assert list(problems(results)) == [
        "diffusers: it drops dora_scale: the rest acts as plain LoRA",
        "stable-diffusion.cpp: it supports neither norm weights nor DoRA: the rest acts as plain LoRA",
    ]


@pytest.mark.parametrize(
    ("base", "module", "width"), [("moss_image", "layers_0_proj_q", 4096), ("flux_3", "single_blocks_0_q_proj", 3072)]
)
@pytest.mark.parametrize("kind", ["dora", "lokr", "loha"])
def test_kinds_that_were_not_tried_in_comfyui_are_not_claimed(base: str, module: str, width: int, kind: str) -> None:
    name = f"lora_unet_{module}"
    down_factor, up_factor = torch.ones(2, width), torch.ones(width, 2)
    tensors = {
        "dora": {
            f"{name}.lora_down.weight": down_factor,
            f"{name}.lora_up.weight": up_factor,
            f"{name}.dora_scale": torch.ones(1, width),
        },
        "lokr": {f"{name}.lokr_w1": torch.ones(2, 2), f"{name}.lokr_w2": torch.ones(width // 2, width // 2)},
        "loha": {f"{name}.hada_w{n}{x}": t for n in (1, 2) for x, t in {"_a": up_factor, "_b": down_factor}.items()},
    }[kind]
    spec = find_spec(list_specs(), base)
    saved = adapter_tensors(to_saved_naming(parse_adapter(tensors, {}, "x"), spec.names))
    metadata = {"ss_base_model_version": {"moss_image": "moss_image", "flux_3": "FLUX.3"}[base]}
    found = readings(list_specs(), {key: tensor.shape for key, tensor in saved.items()}, metadata)
    assert [reading.amount for reading in found if reading.program == "ComfyUI"] == ["none"]


# Recognition of an adapter file's base model from a few of its keys.

ATTN2 = "transformer_blocks_0_attn2_to_k.lora_down.weight"
# The naming of older diffusers versions.
OLD_DIFFUSERS = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight"

CASES = [
    ("sd1", "lora_unet_down_blocks_0_attentions_0_" + ATTN2, (4, 768)),
    ("sd1", "lora_unet_input_blocks_1_1_" + ATTN2, (4, 768)),
    ("sd1", "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", (4, 768)),
    ("sd1", "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.lora_A.weight", (4, 768)),
    ("sd1", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight", (4, 768)),
    ("sd1", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", (4, 768)),
    ("sd2", "lora_unet_down_blocks_0_attentions_0_" + ATTN2, (4, 1024)),
    ("sd2", "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", (4, 1024)),
    ("sd2", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora.down.weight", (4, 1024)),
    ("sdxl", "lora_unet_input_blocks_4_1_" + ATTN2, (4, 2048)),
    ("sd1", OLD_DIFFUSERS, (4, 768)),
    ("sd2", f"unet.{OLD_DIFFUSERS}", (4, 1024)),
    ("sdxl", OLD_DIFFUSERS, (4, 2048)),
    ("sdxl", f"unet.{OLD_DIFFUSERS}", (4, 2048)),
    ("sdxl", "lora_unet_middle_block_1_transformer_blocks_9_attn1_to_q.lora_down.weight", (4, 1280)),
    ("sdxl", "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", (4, 1280)),
    ("sdxl", "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q.lora_A.weight", (4, 640)),
    ("sdxl", "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight", (4, 1280)),
    ("sd1", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.oft_R.weight", (24, 496)),
    ("sd1", "oft_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.oft_blocks", (4, 80, 80)),
    ("sd2", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.oft_R.weight", (32, 496)),
    ("sdxl", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.boft_R", (2, 256, 8, 8)),
    ("hunyuan_image", "lora_unet_double_blocks_0_img_attn_qkv.oft_R.weight", (112, 496)),
    ("flux", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", (4, 3072)),
    ("flux", "lora_unet_double_blocks_0_img_mod_lin.lora_down.weight", (4, 3072)),
    ("flux", "diffusion_model.single_blocks.0.linear1.lora_A.weight", (4, 3072)),
    ("flux", "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", (4, 3072)),
    ("flux", "transformer.transformer_blocks.0.attn.to_q.lora_A.weight", (4, 3072)),
    ("sd3", "transformer.transformer_blocks.0.attn.to_q.lora_A.weight", (4, 1536)),
    ("sd3", "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight", (4, 1536)),
    ("lumina", "lora_unet_layers_0_attention_qkv.lora_down.weight", (4, 2304)),
    ("lumina", "diffusion_model.noise_refiner.0.attention.qkv.lora_A.weight", (4, 2304)),
    ("hunyuan_image", "lora_unet_double_blocks_0_img_mlp_fc1.lora_down.weight", (4, 3584)),
    ("hunyuan_image", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", (4, 3584)),
    ("anima", "lora_unet_blocks_0_cross_attn_q_proj.lora_down.weight", (4, 2048)),
    ("anima", "diffusion_model.llm_adapter.blocks.0.self_attn.q_proj.lora_A.weight", (4, 1024)),
    ("anima", "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight", (4, 2048)),
    ("anima", "text_conditioner.blocks.0.self_attn.q_proj.lora_A.weight", (4, 1024)),
    ("sd3", "transformer.transformer_blocks.0.attn2.to_q.lora_A.weight", (4, 1536)),
    (None, "lora_te_layers_0_self_attn_q_proj.lora_down.weight", (4, 1024)),
    (None, "something.else", (4, 4)),
]


@pytest.mark.parametrize(("base", "key", "shape"), CASES, ids=[f"{base}: {key}" for base, key, _ in CASES])
def test_the_base_model_is_recognised_from_one_key(base: str | None, key: str, shape: tuple[int, ...]) -> None:
    assert base_of({key: shape}) == base


def test_the_error_for_an_unknown_base_model_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"x\.safetensors: its base model .*Anima, FLUX\.1, .*Diffusion 1\.x"):
        require_spec(list_specs(), {"something.else": (4, 4)}, {}, "x.safetensors")


def test_every_recognised_file_gets_the_spec_of_its_base_model() -> None:
    for base, key, shape in CASES:
        if base is not None:
            assert require_spec(list_specs(), {key: shape}, {}, "x").name == base


LAYER = "encoder.layers.0.mlp.fc1"
TEXT_ENCODER_NAMES = (
    "lora_te_text_model_encoder_layers_0_mlp_fc1", "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    f"text_encoder.text_model.{LAYER}", f"text_encoder_2.{LAYER}", f"clip_g.text_model.{LAYER}",
    f"text_encoders.clip_l.transformer.text_model.{LAYER}", "t5.encoder.block.0.layer.0.SelfAttention.q",
    f"base_model.model.text_model.{LAYER}", f"base_model.model.{LAYER}", f"text_encoder.base_model.model.{LAYER}",
    "lycoris_text_model_encoder_layers_0_mlp_fc1", f"text_model.{LAYER}",
)  # fmt: skip
DENOISER_NAMES = (
    "lora_unet_mid_block_attentions_0_proj_in", "unet.mid_block.attentions.0.proj_in", "net.blocks.0.self_attn.q_proj",
    "lora_transformer_transformer_blocks_0_attn_to_q", "transformer.context_embedder", "lora_unet_txt_in",
    "base_model.model.transformer_blocks.0.attn.to_q", "text_conditioner.blocks.0.self_attn.q_proj",
    "lycoris_context_refiner_0_attn_to_q", "diffusion_model.txt_in.individual_token_refiner.blocks.0.mlp.fc1",
)  # fmt: skip


@pytest.mark.parametrize("name", [*TEXT_ENCODER_NAMES, *DENOISER_NAMES])
def test_text_encoder_keys_are_recognised_in_every_naming(name: str, tmp_path: Path) -> None:
    """PEFT folders count too: text encoder outputs must not be cached before --base_weights have been merged."""
    key = f"{name}.lora_A.weight"
    save_safetensors(tmp_path / "adapter_model.safetensors", {key: torch.ones(2, 3)})
    expected = [key] if name in TEXT_ENCODER_NAMES else []
    assert keys_of_text_encoders(tmp_path) == keys_of_text_encoders(tmp_path / "adapter_model.safetensors") == expected


def test_attention_processor_keys_are_converted_to_lora_keys() -> None:
    down, up = torch.ones(4, 768), torch.ones(320, 4)
    file = parse_adapter(
        {OLD_DIFFUSERS: down, OLD_DIFFUSERS.replace("down.weight", "up.weight"): up}, {}, "old.safetensors"
    )
    (module,) = add_model(file, [spec.names for spec in list_specs()]).modules.values()
    assert module.name == f"unet.{OLD_DIFFUSERS.partition('.processor')[0]}.to_k"
    assert set(module.keys.values()) == {f"{module.name}.lora_down.weight", f"{module.name}.lora_up.weight"}


def test_a_fused_layer_of_another_model_is_not_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX.1 has a layer that programs fuse for this made-up model with names and signs like FLUX.1's."""
    flux = find_spec(list_specs(), "flux")
    fused = "double_blocks.0.img_attn.qkv"
    parts = tuple(
        ModuleNames(
            f"lora_unet_double_blocks_0_img_attn_{n}",
            f"diffusion_model.double_blocks.0.img_attn.{n}",
            f"transformer.x.0.{n}",
        )
        for n in ("to_q", "to_k", "to_v")
    )
    names = BaseNames(
        "knots", parts, fused=((".img_attn.qkv", (".img_attn.to_q", ".img_attn.to_k", ".img_attn.to_v")),)
    )
    knots = replace(flux, name="knots", names=names, version="knots")
    tensors = {
        f"lora_unet_{fused.replace('.', '_')}.lora_down.weight": torch.ones(2, 3072),
        f"lora_unet_{fused.replace('.', '_')}.lora_up.weight": torch.ones(9216, 2),
    }
    save_safetensors(tmp_path / "flux.safetensors", tensors, {})
    monkeypatch.setattr(adapter_files, "list_specs", lambda: (knots, *list_specs()))
    file = adapter_files.read_adapter(tmp_path / "flux.safetensors", "--model")
    assert list(file.modules) == [f"lora_unet_{fused.replace('.', '_')}"]
    assert adapter_files.spec_for_file(file, "x").name == "flux"
