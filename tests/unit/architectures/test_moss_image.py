"""MOSS-Image: loading in every layout, and its noise levels."""

import json
import re
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.architectures.moss_image.assembly import build, build_objective
from library.architectures.moss_image.levels import draw_levels, preview_sampler
from library.architectures.moss_image.load import open_loader
from library.architectures.moss_image.options import MossImageOptions
from library.base.errors import UserError
from library.checkpoints.quantised import rotate_groups
from library.diffusion.timesteps import LevelDraws
from library.models.dit_loader import DitLoader
from library.types import CaptionWithImages
from moss_image_train_network import setup_parser
from tests.parity.test_preview import prompt_of
from tests.running import tiny_model
from tests.tiers import first_is_fast
from tests.tiny.changes import assert_same_models, rename_token, with_changes
from tests.tiny.moss_image import build_tiny_moss_image, with_fused_qkv
from tests.tiny.parts import BASE

tiny = tiny_model("moss_image", 3)


def options_of(arguments: list[str]) -> MossImageOptions:
    return MossImageOptions.from_args(setup_parser().parse_args(arguments))


def open_tiny(arguments: list[str]) -> DitLoader:
    return open_loader(options_of(arguments))


@pytest.mark.parametrize("layout", first_is_fast(["whole", "diffusers"]))
def test_every_layout_gives_the_same_models(
    tiny: list[str], tmp_path: Path, layout: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A single file fuses q, k and v, and contains `rope.bands`."""
    actual = open_tiny(build_tiny_moss_image(tmp_path, 3, layout))
    assert len(actual.text_encoders()) == 2  # the vision model too
    assert_same_models(actual, open_tiny(tiny))
    assert "ignoring weights" not in caplog.text


@pytest.mark.parametrize("prefix", ["diffusion_model.", "transformer."])
def test_the_transformers_file_may_have_a_prefix(tiny: list[str], tmp_path: Path, prefix: str) -> None:
    state = load_file(tiny[1])
    save_file({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "other.safetensors")
    assert_same_models(open_tiny([BASE, str(tmp_path / "other.safetensors"), *tiny[2:]]), open_tiny(tiny))


def test_fused_int8_weights_with_rotated_inputs_are_split_as_stored(tiny: list[str], tmp_path: Path) -> None:
    state, layer = with_fused_qkv(load_file(tiny[1])), "layers.0.proj.qkv"
    weight = state[f"{layer}.weight"]
    turned = rotate_groups(weight, 16)
    scales = turned.abs().amax(1, keepdim=True) / 127
    codes = (turned / scales).round().to(torch.int8)
    described = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
    more = {
        f"{layer}.weight": codes,
        f"{layer}.weight_scale": scales,
        f"{layer}.comfy_quant": torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8),
    }
    save_file({**state, **more}, tmp_path / "int8.safetensors")
    loader = open_tiny([BASE, str(tmp_path / "int8.safetensors"), *tiny[2:]])
    value = loader.denoiser().get_parameter("layers.0.proj.v.weight")
    torch.testing.assert_close(value, weight.chunk(3)[2], rtol=0, atol=0.02)
    assert not torch.equal(value, weight.chunk(3)[2])
    parts = loader.denoiser_weights.quantised["layers.0.proj.v.weight"].read()
    assert parts is not None and torch.equal(parts["codes"], codes.chunk(3)[2])
    assert torch.equal(parts["scales"], scales.chunk(3)[2])


@pytest.mark.parametrize(
    ("flag", "changes", "message"),
    [
        (BASE, {"text_embedder.proj.weight": torch.ones(48, 96)}, "features of width 96; use Qwen/Qwen3.5-9B"),
        (BASE, {"text_embedder.proj.weight": None}, "text_embedder.proj.weight is missing; use a complete MOSS-Image"),
        (BASE, {"shared_block_modulation.weight": None}, "it has no shared_block_modulation.weight, so it is not a"),
        (BASE, {"layers.0.q_norm.weight": torch.ones(12)}, "heads of 12, which must be multiples of 8"),
        ("--vae", {"bn.running_mean": None}, "has no bn.running_mean, by which latents are normalized"),
        (
            "--text_encoder",
            {"language_model.layers.0.linear_attn.in_proj_qkv.weight": None},
            "is not a Qwen3.5 text encoder",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_incompatible_file_is_refused_with_the_reason(
    tiny: list[str], tmp_path: Path, flag: str, changes: dict[str, torch.Tensor | None], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        open_tiny(with_changes(tiny, flag, tmp_path, changes))


def test_a_tokenizer_without_a_chat_template_or_its_tokens_is_refused(tmp_path: Path) -> None:
    options = options_of(build_tiny_moss_image(tmp_path, 3))
    (tmp_path / "tokenizer" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"has no chat template; put chat_template.jinja of Qwen/Qwen3.5-9B next to"):
        build(options)
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    rename_token(tmp_path / "tokenizer", "<|image_pad|>")
    with pytest.raises(UserError, match="has no "):
        build(options)


def test_a_text_encoder_without_its_vision_model_encodes_captions_but_not_references(
    tiny: list[str], tmp_path: Path
) -> None:
    changes = {name: None for name in load_file(tiny[5]) if "visual." in name}
    arch = build(options_of(with_changes(tiny, "--text_encoder", tmp_path, changes)))
    encoders = arch.load.text_encoders()
    arch.text.encode(encoders, arch.text.tokenize(["a cat"]))
    with_images = CaptionWithImages("a cat", "digest", lambda: (torch.zeros(3, 32, 32),))
    with pytest.raises(UserError, match="--text_encoder has no vision model, which reference images require; use"):
        arch.text.encode(encoders, arch.text.tokenize([with_images]))


def test_long_captions_are_cut_but_not_with_references(tiny: list[str]) -> None:
    text = build(options_of(tiny)).text
    assert text.tokenize(["dog " * 5000]).ids_BLT[0].shape == (1, 1, 4096)
    with_images = CaptionWithImages("dog " * 5000, "digest", lambda: (torch.zeros(3, 32, 32),))
    with pytest.raises(UserError, match="but the text encoder reads 4096; shorten the caption"):
        text.tokenize([with_images])


# The noise levels of MOSS-Image against the distribution that its authors describe.


def share_below(sigma: float) -> float:
    """Return how often a level is below `sigma`: x = sigmoid(1.09 + 0.95 z) given x <= 0.95, divided by 0.95, or for
    1 % a uniform value."""
    logits = [torch.tensor(x, dtype=torch.float64).logit().item() for x in (0.95 * sigma, 0.95)]
    below, kept = (NormalDist(1.09, 0.95).cdf(logit) for logit in logits)
    return 0.99 * below / kept + 0.01 * sigma


@pytest.mark.parametrize("is_stratified", [False, True])
def test_levels_have_the_published_distribution(is_stratified: bool) -> None:
    count = 200_000
    uniforms = (torch.arange(count) + 0.5) / count if is_stratified else None
    levels = draw_levels(LevelDraws(count, 8, 8, torch.Generator().manual_seed(4), None, uniforms))
    assert torch.equal(levels, (1000 * levels).round() / 1000) and levels.min() > 0 and levels.max() == 1
    for sigma in (0.1, 0.3, 0.5, 0.7, 0.9, 0.99):
        # A level is rounded to the nearest thousandth.
        actual = (levels < sigma + 0.0004).double().mean().item()
        assert actual == pytest.approx(share_below(sigma + 0.0005), abs=2e-4 if is_stratified else 4e-3)


def test_the_options_of_sd_scripts_draw_its_form_of_the_levels() -> None:
    """Without the cut at 0.95 and the uniform share; its table descends, so its mean is negative."""
    words = "--timestep_sampling sigma --weighting_scheme logit_normal --logit_mean -1.09 --logit_std 0.95"
    options = MossImageOptions.from_args(setup_parser().parse_args(words.split()))
    assert options.flow_sampling.discrete_flow_shift == 1.0
    objective = build_objective(options)
    assert objective.takes_offset
    levels = objective.draw_levels(LevelDraws(100_000, 8, 8, torch.Generator().manual_seed(4)))
    for sigma in (0.3, 0.7, 0.9):
        expected = NormalDist(1.09, 0.95).cdf(torch.tensor(sigma, dtype=torch.float64).logit().item())
        assert (levels < sigma).double().mean().item() == pytest.approx(expected, abs=5e-3)


def test_levels_of_many_preview_steps_do_not_repeat() -> None:
    levels = [level.sigma for level in preview_sampler(prompt_of(flow_shift=5.0, num_steps=600)).levels]
    assert levels == sorted(set(levels), reverse=True) and levels[0] == 1.0
