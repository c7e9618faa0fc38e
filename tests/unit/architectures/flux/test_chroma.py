"""Files and options with --model_type chroma."""

import logging
import re
from pathlib import Path

import pytest
import torch

from flux_train_network import setup_parser
from library.architectures.flux.assembly import build
from library.architectures.flux.load import open_loader
from library.architectures.flux.options import FluxOptions
from library.architectures.specs import list_specs
from library.checkpoints.recognition import recognise_adapter
from library.errors import UserError
from library.protocols import Architecture
from tests.tiny.changes import with_changes, without
from tests.tiny.chroma import build_tiny_chroma
from tests.tiny.flux import build_tiny_flux

BASE = "--pretrained_model_name_or_path"
USUAL = ["--guidance_scale", "0", "--timestep_sampling", "sigmoid", "--model_prediction_type", "raw"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_chroma(tmp_path_factory.mktemp("chroma"), 6)


def options_of(arguments: list[str]) -> FluxOptions:
    return FluxOptions.from_args(setup_parser().parse_args(arguments))


def built(arguments: list[str]) -> Architecture:
    return build(options_of(arguments))


def test_every_layout_gives_the_same_models(tiny: list[str], tmp_path: Path) -> None:
    expected = open_loader(options_of(tiny))
    for layout in ("whole", "diffusers"):
        found = open_loader(options_of(build_tiny_chroma(tmp_path / layout, 6, layout)))  # type: ignore[arg-type]
        assert len(found.text_encoders()) == 1
        for theirs, ours in (
            (expected.denoiser(), found.denoiser()),
            (expected.vae(), found.vae()),
            *zip(expected.text_encoders(), found.text_encoders(), strict=True),
        ):
            state = ours.state_dict()
            assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize(
    ("flag", "changes", "message"),
    [
        (BASE, {"txt_in.weight": torch.ones(64, 48)}, "the transformer expects text features of width 48; use Ch"),
        (BASE, {"txt_in.weight": None}, "txt_in.weight is missing; use a complete Chroma"),
        (BASE, {"distilled_guidance_layer.in_proj.weight": None}, "in_proj.weight is missing; use a complete Chroma"),
        (BASE, {"img_in.weight": torch.ones(64, 128)}, "the transformer takes 128 values per patch, but only 64"),
        ("--ae", {"decoder.conv_in.weight": torch.ones(16, 4, 3, 3)}, "has 4 latent channels, but Chroma needs 16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_file_that_does_not_fit_is_named(
    tiny: list[str], tmp_path: Path, flag: str, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        built(with_changes(tiny, flag, tmp_path, changes))


def test_parts_that_are_missing_are_asked_for_and_clip_is_none_of_them(tiny: list[str]) -> None:
    for flag in ("--ae", "--t5xxl"):
        with pytest.raises(UserError, match=f"{flag} is missing"):
            built(without(tiny, flag))


@pytest.mark.parametrize("layout", ["files", "diffusers"])
def test_the_other_model_of_the_script_is_told_with_the_flag(tmp_path: Path, layout: str) -> None:
    flux = build_tiny_flux(tmp_path / "flux", 7, layout)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="this is a FLUX model; remove --model_type chroma"):
        built([*flux, "--model_type", "chroma"])
    chroma = build_tiny_chroma(tmp_path / "chroma", 7, layout)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="this is a Chroma model; add --model_type chroma"):
        built([*without(chroma, "--model_type"), "--clip_l", "x"])


def test_the_mask_of_the_padding_is_always_on_and_in_the_file(
    tiny: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    arch = built([*tiny, *USUAL])
    assert "--apply_t5_attn_mask is enabled: Chroma was trained" in caplog.text
    assert arch.metadata["ss_apply_t5_attn_mask"] == "True" and arch.metadata["ss_model_type"] == "chroma"
    assert arch.metadata["ss_base_model_version"] == "chroma" and arch.metadata["ss_guidance_scale"] == "0.0"
    assert arch.metadata["modelspec.architecture"] == "chroma/lora"
    assert arch.metadata["modelspec.implementation"] == "https://huggingface.co/lodestones/Chroma"
    caplog.clear()
    built([*tiny, *USUAL, "--apply_t5_attn_mask"])
    assert "apply_t5_attn_mask" not in caplog.text


def test_settings_that_chroma_was_not_made_with_are_warned_of(
    tiny: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    built([*tiny, *USUAL])
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    built(tiny)
    for line in (
        "--guidance_scale is 3.5; Chroma was trained with --guidance_scale 0.0",
        "--timestep_sampling is sigma; Chroma was trained with --timestep_sampling sigmoid",
        "--model_prediction_type sigma_scaled converts the output to something other",
    ):
        assert line in caplog.text


def test_clip_is_said_to_be_unused(tiny: list[str]) -> None:
    assert built([*tiny, "--clip_l", "nowhere.safetensors"]).ignores["clip_l"] == "Chroma reads captions only with T5"


def test_a_text_cache_is_of_t5_alone_and_has_what_sd_scripts_reads(tiny: list[str], tmp_path: Path) -> None:
    spec = built([*tiny, "--t5xxl_max_token_length", "24"]).text_cache
    assert spec is not None and spec.keys == ("t5_out", "t5_attn_mask")
    assert {name: tuple(value.shape) for name, value in spec.constants.items()} == {
        "l_pooled": (77, 1), "txt_ids": (24, 3), "apply_t5_attn_mask": (),
    }  # fmt: skip
    others = [[*tiny, "--t5xxl_max_token_length", "23"], build_tiny_chroma(tmp_path, 8)]
    for other in (built(arguments).text_cache for arguments in others):
        assert other is not None and (other.encoders(), other.settings) != (spec.encoders(), spec.settings)


def test_padding_in_t5_changes_no_token_of_the_caption(tiny: list[str]) -> None:
    """Longer padding is masked: the caption's states are the same to rounding."""
    states = []
    for length in ("8", "20"):
        arch = built([*tiny, "--t5xxl_max_token_length", length])
        found = arch.text.encode(arch.load.text_encoders(), arch.text.tokenize(["a red cat"]))
        num_tokens = int(found["t5_attn_mask"].sum())
        states.append(found["t5_out"][:, :num_tokens])
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("modules", "version", "base"),
    [
        (("double_blocks_0_img_attn_qkv", "single_blocks_3_linear1"), None, "flux"),
        (("double_blocks_0_img_attn_qkv", "single_blocks_3_linear1"), "flux1", "flux"),
        (("double_blocks_0_img_attn_qkv", "single_blocks_3_linear1"), "chroma", "chroma"),
        (("double_blocks_0_img_attn_qkv", "double_blocks_0_img_mod_lin"), "chroma", "flux"),
        (("single_blocks_0_linear1", "distilled_guidance_layer_in_proj"), "flux1", "chroma"),
    ],
    ids=str,
)
def test_an_adapter_file_is_told_by_its_layers_and_then_by_its_header(
    modules: tuple[str, ...], version: str | None, base: str
) -> None:
    shapes = {f"lora_unet_{module}.lora_down.weight": (4, 3072) for module in modules}
    spec = recognise_adapter(list_specs(), shapes, {"ss_base_model_version": version} if version else {})
    assert spec is not None and spec.name == base
