"""Loading FLUX.1 and Chroma: a VAE with a prefix, and options of --model_type chroma."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_train_network import setup_parser
from library.architectures.flux.assembly import build
from library.architectures.flux.load import open_loader
from library.architectures.flux.options import FluxOptions
from library.architectures.specs import list_specs
from library.base.errors import UserError
from library.checkpoints.recognition import recognise_adapter
from library.protocols import Architecture
from tests.running import tiny_model
from tests.tiny.changes import without
from tests.tiny.chroma import build_tiny_chroma
from tests.tiny.flux import build_tiny_flux
from tests.unit.architectures.test_dit_files import open_tiny

tiny = tiny_model("flux", 3)


@pytest.mark.parametrize("prefix", ["vae.", "first_stage_model."])
def test_a_vae_with_a_prefix_loads_the_same(tiny: list[str], tmp_path: Path, prefix: str) -> None:
    index = tiny.index("--ae") + 1
    path = tmp_path / "ae.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(tiny[index]).items()}, path)
    actual = open_tiny("flux", [*tiny[:index], str(path), *tiny[index + 1 :]]).vae().state_dict()
    expected = open_tiny("flux", tiny).vae().state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


# Files and options of --model_type chroma.

CHROMA_DEFAULTS = ["--guidance_scale", "0", "--timestep_sampling", "sigmoid", "--model_prediction_type", "raw"]


tiny_chroma = tiny_model("chroma", 6)


def options_of(arguments: list[str]) -> FluxOptions:
    return FluxOptions.from_args(setup_parser().parse_args(arguments))


def build_arch(arguments: list[str]) -> Architecture:
    return build(options_of(arguments))


@pytest.mark.parametrize("layout", ["files", "diffusers"])
def test_flux_and_chroma_files_are_recognised_and_the_error_names_the_flag(tmp_path: Path, layout: str) -> None:
    flux = build_tiny_flux(tmp_path / "flux", 7, layout)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="this is a FLUX model; remove --model_type chroma"):
        build_arch([*flux, "--model_type", "chroma"])
    chroma = build_tiny_chroma(tmp_path / "chroma", 7, layout)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="this is a Chroma model; add --model_type chroma"):
        build_arch([*without(chroma, "--model_type"), "--clip_l", "x"])


def test_the_padding_mask_is_always_on_and_recorded_in_the_metadata(
    tiny_chroma: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    arch = build_arch([*tiny_chroma, *CHROMA_DEFAULTS])
    assert "--apply_t5_attn_mask is enabled: Chroma was trained" in caplog.text
    assert arch.metadata["ss_apply_t5_attn_mask"] == "True" and arch.metadata["ss_model_type"] == "chroma"
    assert arch.metadata["ss_base_model_version"] == "chroma" and arch.metadata["ss_guidance_scale"] == "0.0"
    assert arch.metadata["modelspec.architecture"] == "chroma/lora"
    assert arch.metadata["modelspec.implementation"] == "https://huggingface.co/lodestones/Chroma"
    caplog.clear()
    build_arch([*tiny_chroma, *CHROMA_DEFAULTS, "--apply_t5_attn_mask"])
    assert "apply_t5_attn_mask" not in caplog.text


def test_settings_that_chroma_was_not_trained_with_are_warned_about(
    tiny_chroma: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    build_arch([*tiny_chroma, *CHROMA_DEFAULTS])
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    build_arch(tiny_chroma)
    for line in (
        "--guidance_scale is 3.5; Chroma was trained with --guidance_scale 0.0",
        "--timestep_sampling is sigma; Chroma was trained with --timestep_sampling sigmoid",
        "--model_prediction_type sigma_scaled converts the output to something other",
    ):
        assert line in caplog.text


def test_the_text_cache_holds_t5_features_and_the_other_entries_that_sd_scripts_reads(
    tiny_chroma: list[str], tmp_path: Path
) -> None:
    spec = build_arch([*tiny_chroma, "--t5xxl_max_token_length", "24"]).text_cache
    assert spec is not None and spec.keys == ("t5_out", "t5_attn_mask")
    assert {name: tuple(value.shape) for name, value in spec.constants.items()} == {
        "l_pooled": (77, 1),
        "txt_ids": (24, 3),
        "apply_t5_attn_mask": (),
    }
    others = [[*tiny_chroma, "--t5xxl_max_token_length", "23"], build_tiny_chroma(tmp_path, 8)]
    for other in (build_arch(arguments).text_cache for arguments in others):
        assert other is not None and (other.encoders(), other.settings) != (spec.encoders(), spec.settings)


def test_t5_padding_does_not_change_the_states_of_a_caption(tiny_chroma: list[str]) -> None:
    """Padding is masked, so the caption's states agree up to rounding whatever its length."""
    states = []
    for length in ("8", "20"):
        arch = build_arch([*tiny_chroma, "--t5xxl_max_token_length", length])
        features = arch.text.encode(arch.load.text_encoders(), arch.text.tokenize(["a red cat"]))
        num_tokens = int(features["t5_attn_mask"].sum())
        states.append(features["t5_out"][:, :num_tokens])
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
def test_an_adapter_is_recognised_by_its_layers_and_then_by_its_metadata(
    modules: tuple[str, ...], version: str | None, base: str
) -> None:
    shapes = {f"lora_unet_{module}.lora_down.weight": (4, 3072) for module in modules}
    spec = recognise_adapter(list_specs(), shapes, {"ss_base_model_version": version} if version else {})
    assert spec is not None and spec.name == base


def test_the_vocabulary_of_a_loader_is_that_of_its_first_text_encoder(tiny_chroma: list[str], tmp_path: Path) -> None:
    """Chroma's is T5, FLUX.1's CLIP, whose word embeddings have other names than a language model's."""
    chroma = open_loader(options_of(tiny_chroma))
    assert chroma.num_words == chroma.text_encoders()[0].get_parameter("shared.weight").shape[0]
    flux = open_loader(options_of(build_tiny_flux(tmp_path, 7)))
    embeddings = [encoder.get_input_embeddings().weight for encoder in flux.text_encoders()]  # type: ignore[operator]
    assert [part.num_words for part in flux.texts] == [len(weight) for weight in embeddings]
    assert flux.num_words == len(embeddings[0])
