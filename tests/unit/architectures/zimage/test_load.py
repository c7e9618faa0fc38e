"""Z-Image models load alike in every layout; other files are refused with what they are."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.zimage.assembly import build
from library.architectures.zimage.load import open_loader
from library.architectures.zimage.options import ZImageOptions
from library.architectures.zimage.reference import diffusers_state
from library.errors import UserError
from library.models.dit_loader import DitLoader
from tests.tiny.changes import assert_same_models, with_changes
from tests.tiny.zimage import CONFIG, build_tiny_zimage
from zimage_train_network import setup_parser

BASE = "--pretrained_model_name_or_path"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return build_tiny_zimage(tmp_path_factory.mktemp("zimage"), 3)


def options_of(arguments: list[str]) -> ZImageOptions:
    return ZImageOptions.from_args(setup_parser().parse_args(arguments))


def open_tiny(arguments: list[str]) -> DitLoader:
    return open_loader(options_of(arguments))


@pytest.mark.parametrize("layout", ["whole", "diffusers"])
def test_every_layout_gives_the_same_models(tiny: list[str], tmp_path: Path, layout: Any) -> None:
    assert_same_models(open_tiny(build_tiny_zimage(tmp_path, 3, layout)), open_tiny(tiny))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("is_diffusers", [False, True], ids=["original", "diffusers"])
def test_a_single_file_may_have_either_layout_and_either_prefix(
    tiny: list[str], tmp_path: Path, prefix: str, is_diffusers: bool
) -> None:
    state = load_file(tiny[1])
    if is_diffusers:
        del state["norm_final.weight"]
        state = diffusers_state(state, CONFIG.width)
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "other.safetensors")
    assert_same_models(open_tiny([BASE, str(tmp_path / "other.safetensors"), *tiny[2:]]), open_tiny(tiny))


@pytest.mark.parametrize(
    ("flag", "changes", "message"),
    [
        (BASE, {"x_embedder.weight": torch.ones(48, 16)}, "takes 16 values per patch, but only 64"),
        (
            BASE,
            {"cap_embedder.1.weight": torch.ones(48, 64)},
            "has width 40, but the transformer expects text features of width 64; use Qwen/Qwen3-4B",
        ),
        (BASE, {"t_embedder.mlp.2.weight": None}, "t_embedder.mlp.2.weight is missing; use a complete Z-Image"),
        (BASE, {"layers.0.attention.qkv.weight": torch.ones(80, 48)}, "heads of 16, 80 outputs of q, k and v"),
        (BASE, {"siglip_embedder.1.weight": torch.ones(4, 4)}, "this is Z-Image Omni, which cannot be trained"),
        ("--vae", {"decoder.conv_in.weight": torch.ones(16, 4, 3, 3)}, "has 4 latent channels, but Z-Image needs 16"),
        ("--vae", {"decoder.conv_in.weight": None}, "is not a VAE: it has no decoder.conv_in.weight"),
        ("--text_encoder", {"model.embed_tokens.weight": None}, "qwen_3_4b.safetensors is not a Qwen3 text encoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_incompatible_file_is_refused_with_the_reason(
    tiny: list[str], tmp_path: Path, flag: str, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        open_tiny(with_changes(tiny, flag, tmp_path, changes))


def test_the_text_encoder_may_be_kept_in_8_bits(tiny: list[str]) -> None:
    (full,), (quantised,) = open_tiny(tiny).text_encoders(), open_tiny([*tiny, "--fp8_llm"]).text_encoders()
    ids = torch.arange(8)[None]
    expected, actual = full(ids).last_hidden_state, quantised(ids).last_hidden_state
    assert not torch.equal(actual, expected)
    assert torch.nn.functional.cosine_similarity(actual, expected, dim=-1).min() > 0.98


# Recognising Turbo


def test_turbo_without_a_training_adapter_is_warned_about_once(
    tiny: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    turbo, base = (build(options_of([*tiny, "--model_version", version])) for version in ("turbo", "base"))
    assert caplog.text.count("is Z-Image Turbo, which is distilled") == 1
    assert (turbo.preview.defaults.num_steps, turbo.preview.defaults.scale) == (8, 1.0)
    assert (base.preview.defaults.num_steps, base.preview.defaults.scale) == (50, 5.0)
    caplog.clear()
    build(options_of([*tiny, "--model_version", "turbo", "--base_weights", "adapter.safetensors"]))
    assert "distilled" not in caplog.text
