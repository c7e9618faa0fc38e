"""FLUX.2 models load alike in every layout; other files are refused with what they are."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flux_2_train_network import setup_parser
from library.architectures.flux_2.assembly import build
from library.architectures.flux_2.load import open_loader
from library.architectures.flux_2.options import VERSIONS, Flux2Options
from library.architectures.flux_2.releases import DEV, KLEIN_4B, KLEIN_9B, recognise_encoder, recognise_release
from library.base.errors import UserError
from library.checkpoints.weights import Weights
from library.models.dit_loader import DitLoader
from library.models.vae.flux_2 import COUNTER, statistics
from tests.running import tiny_model
from tests.tiny import flux_2 as tiny_flux_2
from tests.tiny.changes import rename_token, without
from tests.tiny.flux_2 import build_tiny_flux_2

tiny = tiny_model("flux_2", 3)
tiny_dev = tiny_model("flux_2", 3, is_dev=True)


def options_of(arguments: list[str]) -> Flux2Options:
    return Flux2Options.from_args(setup_parser().parse_args(arguments))


def open_tiny(arguments: list[str]) -> DitLoader:
    return open_loader(options_of(arguments))[0]


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_the_statistics_of_the_vae_stay_in_float32(tiny: list[str], tmp_path: Path, layout: str) -> None:
    _, state = tiny_flux_2.tiny_vae(4)
    if layout == "original":
        state = {name: tensor for name, tensor in tiny_flux_2.original_vae(state).items() if name != COUNTER}
    save_file(state, tmp_path / "vae.safetensors")
    arguments = [*without(tiny, "--vae"), "--vae", str(tmp_path / "vae.safetensors"), "--mixed_precision", "bf16"]
    vae = open_tiny(arguments).vae()
    mean, deviation = statistics(vae, torch.device("cpu"))
    assert next(vae.parameters()).dtype == torch.bfloat16 and mean.shape == (128, 1, 1)
    torch.testing.assert_close(mean.flatten(), state["bn.running_mean"], rtol=0, atol=0)
    torch.testing.assert_close(deviation.flatten(), (state["bn.running_var"] + 1e-4).sqrt(), rtol=0, atol=0)


def test_klein_and_dev_refuse_the_text_encoder_of_the_other(tiny: list[str], tiny_dev: list[str]) -> None:
    with pytest.raises(UserError, match=r"--text_encoder .* is not a Qwen3 text encoder"):
        open_tiny([*tiny[:5], tiny_dev[5]])
    with pytest.raises(UserError, match=r"--text_encoder .* is not a Mistral 3 text encoder"):
        open_tiny([*tiny_dev[:5], tiny[5]])


def test_a_tokenizer_without_the_special_tokens_of_devs_template_is_refused(tmp_path: Path) -> None:
    arguments = build_tiny_flux_2(tmp_path, 3, is_dev=True)
    rename_token(tmp_path / "tokenizer", "[SYSTEM_PROMPT]")
    message = r"has no \[SYSTEM_PROMPT\]: it belongs to another model; use that of mistralai/Mistral-Small-3\.1-24B"
    with pytest.raises(UserError, match=message):
        build(options_of(arguments))


# Recognising the release


@pytest.mark.parametrize("config", [tiny_flux_2.DEV, tiny_flux_2.KLEIN_4B, tiny_flux_2.KLEIN_9B])
def test_a_release_is_recognised_by_its_sizes_and_checked_against_model_version(config: Any) -> None:
    release = recognise_release(config, None, "a.safetensors")
    sizes = [tiny_flux_2.DEV, tiny_flux_2.KLEIN_4B, tiny_flux_2.KLEIN_9B]
    assert release is (DEV, KLEIN_4B, KLEIN_9B)[sizes.index(config)] and release.text_width == config.text_width
    for version in VERSIONS:
        if version.replace("base-", "") == release.name:
            assert recognise_release(config, version, "a.safetensors") is release
            continue
        message = (
            f"--model_version is {version}, but a.safetensors is the transformer of {release.title}, with text feat"
        )
        with pytest.raises(UserError, match=message):
            recognise_release(config, version, "a.safetensors")


def test_model_version_decides_for_a_klein_of_unknown_size() -> None:
    assert recognise_release(tiny_flux_2.CONFIG, "klein-base-9b", "a") is KLEIN_9B
    with pytest.raises(UserError, match=r"--model_version is dev, but a is the transformer of FLUX\.2 klein 4B"):
        recognise_release(tiny_flux_2.CONFIG, "dev", "a")


@pytest.mark.parametrize(
    ("width", "is_qwen3", "version", "expected"),
    [
        (2560, True, None, KLEIN_4B),
        (4096, True, None, KLEIN_9B),
        (5120, False, None, DEV),
        (2560, True, "klein-base-4b", KLEIN_4B),
        (16, True, "klein-9b", KLEIN_9B),
        (2560, True, "klein-9b", "has width 2560, which is for FLUX.2 klein 4B, but --model_version klein-9b needs "
         "width 4096; use Qwen/Qwen3-8B"),
        (4096, True, "dev", "has width 4096, which is for FLUX.2 klein 9B, but --model_version dev needs width 5120"),
    ],
)  # fmt: skip
def test_a_text_encoder_alone_is_recognised_by_its_names_and_width(
    width: int, is_qwen3: bool, version: str | None, expected: Any
) -> None:
    shapes = {"model.embed_tokens.weight": (9, width)} | (
        {"model.layers.0.self_attn.q_norm.weight": (128,)} if is_qwen3 else {}
    )
    weights = Weights("a.safetensors", shapes, lambda name: torch.empty(shapes[name]))
    if isinstance(expected, str):
        with pytest.raises(UserError, match=re.escape(expected)):
            recognise_encoder(weights, version)
    else:
        assert recognise_encoder(weights, version) is expected.encoder


@pytest.mark.parametrize(
    ("version", "steps", "scale", "guidance", "warns"),
    [("klein-4b", 4, 1.0, None, True), ("klein-base-4b", 50, 4.0, None, False), ("dev", 50, 1.0, 4.0, True)],
)
def test_a_distilled_model_without_a_training_adapter_is_warned_about_once(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture, version: str, steps: int, scale: float,
    guidance: float | None, warns: bool,
) -> None:  # fmt: skip
    arguments = [*request.getfixturevalue("tiny_dev" if version == "dev" else "tiny"), "--model_version", version]
    arch = build(options_of(arguments))
    assert caplog.text.count("which is distilled") == warns
    defaults = arch.preview.defaults
    assert (defaults.num_steps, defaults.scale, defaults.guidance_scale) == (steps, scale, guidance)
    assert arch.metadata["modelspec.architecture"] == f"Flux.2-{version.replace('base-', '')}/lora"
    caplog.clear()
    build(options_of([*arguments, "--base_weights", "adapter.safetensors"]))
    assert "distilled" not in caplog.text
