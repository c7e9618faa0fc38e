"""Krea 2 models load alike in every layout; other files are refused with what they are."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from krea2_train_network import setup_parser
from library.architectures.krea2.assembly import build
from library.architectures.krea2.load import open_loader
from library.architectures.krea2.options import Krea2Options
from library.architectures.krea2.reference import diffusers_state
from library.architectures.krea2.text import LAYERS
from library.errors import UserError
from library.models.dit_loader import DitLoader
from library.models.language_models import encode_layers
from tests.tiny.changes import assert_same_models, with_changes
from tests.tiny.krea2 import build_tiny_krea2

BASE = "--pretrained_model_name_or_path"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_krea2(tmp_path_factory.mktemp("krea2"), 3)


def options_of(arguments: list[str]) -> Krea2Options:
    return Krea2Options.from_args(setup_parser().parse_args(arguments))


def open_tiny(arguments: list[str]) -> DitLoader:
    return open_loader(options_of(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["whole", "diffusers"])
def test_every_layout_gives_the_same_models(tiny: list[str], tmp_path: Path, layout: Any) -> None:
    assert_same_models(open_tiny(build_tiny_krea2(tmp_path, 3, layout)), open_tiny(tiny))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("is_diffusers", [False, True], ids=["original", "diffusers"])
def test_a_single_file_may_have_either_layout_and_either_prefix(
    tiny: list[str], tmp_path: Path, prefix: str, is_diffusers: bool
) -> None:
    state = load_file(tiny[1])
    state = diffusers_state(state) if is_diffusers else state
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "other.safetensors")
    for more in ([], ["--mixed_precision", "bf16"]):  # the modulation is reshaped and also cast
        actual = open_tiny([BASE, str(tmp_path / "other.safetensors"), *tiny[2:], *more]).denoiser().state_dict()
        expected = open_tiny([*tiny, *more]).denoiser().state_dict()
        assert actual.keys() == expected.keys()
        assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("flag", "changes", "message"),
    [
        (BASE, {"first.weight": torch.ones(64, 16)}, "takes 16 values per patch, but only 64"),
        (BASE, {"txtfusion.projector.weight": torch.ones(1, 8)}, "takes 8 states of the text encoder for each token"),
        (
            BASE,
            {"txtfusion.layerwise_blocks.0.attn.wq.weight": torch.ones(32, 32)},
            "has width 16, but the transformer expects text features of width 32; use Qwen/Qwen3-VL-4B-Instruct",
        ),
        (BASE, {"tmlp.0.weight": None}, "tmlp.0.weight is missing; use a complete Krea 2"),
        (BASE, {"blocks.0.attn.wk.weight": torch.ones(48, 64)}, "width 64, heads of 16 and 3 heads of keys"),
        (BASE, {"blocks.0.attn.qknorm.qnorm.scale": torch.ones(8)}, "heads of 8, which must be multiples of 16"),
        ("--vae", {"decoder.conv1.weight": torch.ones(16, 4, 3, 3, 3)}, "has 4 latent channels, but Krea 2 needs 16"),
        ("--vae", {"decoder.middle.0.residual.0.gamma": None}, "is not the VAE of Qwen-Image"),
        ("--text_encoder", {"model.language_model.embed_tokens.weight": None}, "is not a Qwen3-VL text encoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_incompatible_file_is_refused_with_the_reason(
    tiny: list[str], tmp_path: Path, flag: str, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        open_tiny(with_changes(tiny, flag, tmp_path, changes))


def test_a_shallow_text_encoder_is_refused(tiny: list[str], tmp_path: Path) -> None:
    state = {k: v for k, v in load_file(tiny[5]).items() if not re.search(r"language_model\.layers\.3\d\.", k)}
    save_file(state, tmp_path / "shallow.safetensors")
    with pytest.raises(UserError, match=r"shallow\.safetensors has 30 layers, but the first 35 are used"):
        open_tiny([*tiny[:5], str(tmp_path / "shallow.safetensors")])


def test_the_text_encoder_may_be_kept_in_8_bits(tiny: list[str]) -> None:
    (full,), (quantised,) = open_tiny(tiny).text_encoders(), open_tiny([*tiny, "--fp8_text_encoder"]).text_encoders()
    ids = torch.arange(8)[None]
    expected, actual = (encode_layers(encoder, ids, torch.ones_like(ids), LAYERS[:3]) for encoder in (full, quantised))
    assert not torch.equal(actual, expected)  # later layers of so narrow a model amplify the rounding error
    assert torch.nn.functional.cosine_similarity(actual, expected, dim=-1).min() > 0.97


# Recognising Turbo


def test_turbo_without_a_training_adapter_is_warned_about_once(
    tiny: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for variant in ("turbo", "raw"):
        build(options_of([*tiny, "--dit_variant", variant]))
    assert caplog.text.count("is Krea 2 Turbo, which is distilled") == 1
    caplog.clear()
    build(options_of([*tiny, "--dit_variant", "turbo", "--base_weights", "adapter.safetensors"]))
    assert "distilled" not in caplog.text


# Turbo for previews


def test_turbo_dit_is_loaded_for_previews(tiny: list[str], tmp_path: Path) -> None:
    turbo = build_tiny_krea2(tmp_path, 8, name="turbo")
    preview = build(options_of([*tiny, "--turbo_dit", turbo[1]])).preview
    assert preview.load_denoiser is not None and (preview.defaults.num_steps, preview.defaults.scale) == (8, 1.0)
    actual, expected = preview.load_denoiser(None).state_dict(), open_tiny(turbo).denoiser().state_dict()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert build(options_of(tiny)).preview.load_denoiser is None


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        ({"first.weight": None}, [], "first.weight is missing; use a complete Krea 2"),
        ({"txtfusion.projector.weight": None}, [], "--turbo_dit .*turbo.safetensors: it has no txtfusion.projector"),
        ({"blocks.0.mlp.gate.weight": torch.ones(80, 64)}, [], "and the base .* have different sizes"),
        ({"blocks.0.mlp.up.scale_weight": torch.ones(())}, [], "is stored differently from the base"),
        ({}, ["--network_args", "dora_wd=True"], "--turbo_dit does not work with dora_wd"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_turbo_dit_that_cannot_replace_the_base_is_refused(
    tiny: list[str], tmp_path: Path, changes: dict[str, Any], more: list[str], message: str
) -> None:
    turbo = build_tiny_krea2(tmp_path, 8, name="turbo")
    state: dict[str, Any] = {**load_file(turbo[1]), **changes}
    if "blocks.0.mlp.up.scale_weight" in changes:
        state["blocks.0.mlp.up.weight"] = state["blocks.0.mlp.up.weight"].to(torch.float8_e4m3fn)
    save_file({name: tensor for name, tensor in state.items() if tensor is not None}, turbo[1])
    with pytest.raises(UserError, match=message):
        build(options_of([*tiny, "--turbo_dit", turbo[1], *more]))


def test_a_turbo_dit_is_refused_for_a_dora_trained_further(tiny: list[str], tmp_path: Path) -> None:
    """Its settings are in its file, not in --network_args."""
    turbo, name = build_tiny_krea2(tmp_path, 8, name="turbo"), "diffusion_model.blocks.0.attn.wq"
    lora = {f"{name}.lora_A.weight": torch.ones(4, 64), f"{name}.lora_B.weight": torch.ones(64, 4)}
    for file, more in (("lora", {}), ("dora", {f"{name}.lora_magnitude_vector": torch.ones(64)})):
        save_file({**lora, **more}, tmp_path / file)
    words = [*tiny, "--turbo_dit", turbo[1], "--dim_from_weights", "--network_weights"]
    build(options_of([*words, str(tmp_path / "lora")]))
    with pytest.raises(UserError, match=r"--turbo_dit does not work with a DoRA.*dora is one"):
        build(options_of([*words, str(tmp_path / "dora")]))
