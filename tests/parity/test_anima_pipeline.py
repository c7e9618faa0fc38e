"""Anima's text, latents and previews against the parts of diffusers' pipeline."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from library.architectures.anima.reference import diffusers_models
from library.models.vae.qwen_image import MEAN, STD
from library.types import Prompt
from tests.parity.test_preview import ours
from tests.parity.tiny_models import open_run
from tests.tiny.anima import build_tiny_anima, oracle_velocity
from tests.tolerances import FLOAT32_DEEP, FLOAT32_SAMPLED

CAPTIONS = ["a red cat", "dog", ""]
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny_anima_folders")


@pytest.fixture(scope="module")
def run(folder: Path) -> Any:
    arguments = build_tiny_anima(folder, seed=51, has_folders=True)
    lengths = ["--qwen3_max_token_length", str(NUM_TOKENS), "--t5_max_token_length", str(NUM_TOKENS)]
    return open_run("anima", [*arguments, *lengths])


@pytest.fixture(scope="module")
def encoded(folder: Path) -> dict[str, Tensor]:
    """Encode the captions with diffusers' text step, each with the empty negative prompt."""
    from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep
    from transformers import Qwen2Tokenizer, Qwen3Model, T5TokenizerFast

    components: Any = SimpleNamespace(
        text_encoder=Qwen3Model.from_pretrained(folder / "qwen3"),
        tokenizer=Qwen2Tokenizer.from_pretrained(folder / "tokenizer", padding_side="right"),
        t5_tokenizer=T5TokenizerFast.from_pretrained(folder / "t5_tokenizer"),
    )
    with torch.no_grad():
        step: Any = AnimaTextEncoderStep
        features: dict[str, Tensor] = step.encode_prompt(
            components, CAPTIONS, "", device=torch.device("cpu"), dtype=torch.float32
        )
    return features


def test_text_features_match_diffusers_except_for_more_padding(run: Any, encoded: dict[str, Tensor]) -> None:
    with torch.no_grad():
        got = run.arch.text.encode(run.models.text_encoders, run.arch.text.tokenize(CAPTIONS))
    for name, theirs in (
        ("prompt_embeds", "qwen_prompt_embeds"),
        ("attn_mask", "qwen_attention_mask"),
        ("t5_input_ids", "t5_input_ids"),
        ("t5_attn_mask", "t5_attention_mask"),
    ):
        expected = encoded[theirs]
        length = expected.shape[1]
        assert length < NUM_TOKENS
        torch.testing.assert_close(got[name][:, :length].to(expected.dtype), expected, **FLOAT32_DEEP)
        assert got[name].shape[1] == NUM_TOKENS and not got[name][:, length:].any()
    assert not got["prompt_embeds"][2].any()
    assert got["prompt_embeds"][0].abs().max() > 0.1


def test_the_text_encoder_gets_finite_gradients_from_captions_of_all_lengths(run: Any) -> None:
    encoder = run.models.text_encoders[0]
    weight = encoder.layers[0].self_attn.q_proj.weight.requires_grad_()
    states = run.arch.text.encode([encoder], run.arch.text.tokenize(CAPTIONS))["prompt_embeds"]
    (gradient,) = torch.autograd.grad(states.square().sum(), weight)
    weight.requires_grad_(False)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_the_latent_statistics_match_diffusers() -> None:
    import inspect

    from diffusers import AutoencoderKLQwenImage

    parameters = inspect.signature(AutoencoderKLQwenImage.__init__).parameters
    assert (list(MEAN), list(STD)) == (parameters["latents_mean"].default, parameters["latents_std"].default)


def test_latents_and_images_match_diffusers(run: Any, folder: Path) -> None:
    from diffusers import AutoencoderKLQwenImage
    from diffusers.modular_pipelines.anima.encoders import encode_vae_image

    theirs: Any = AutoencoderKLQwenImage.from_pretrained(folder / "vae")
    pixels = torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(3)) * 2 - 1
    vae = run.arch.load.vae()
    encode: Any = encode_vae_image
    with torch.no_grad():
        latents = run.arch.codec.encode(vae, pixels, [])
        expected = encode(pixels, theirs, None, torch.device("cpu"), torch.float32)
        assert latents.shape == (2, 16, 6, 10)
        assert latents.abs().max() > 0.1
        torch.testing.assert_close(latents, expected[:, :, 0], **FLOAT32_DEEP)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (MEAN, STD))
        images = theirs.decode(expected * std + mean).sample[:, :, 0]
        torch.testing.assert_close(run.arch.codec.decode(vae, latents), images, **FLOAT32_DEEP)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_skipping_the_frame_cache_keeps_images_bit_for_bit(run: Any, dtype: torch.dtype) -> None:
    vae = run.arch.load.vae().to(dtype)
    pixels = torch.rand(1, 3, 40, 24, generator=torch.Generator().manual_seed(4)) * 2 - 1
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (MEAN, STD))
    with torch.no_grad():
        latents = run.arch.codec.encode(vae, pixels, [])
        expected = vae.encode(pixels[:, :, None].to(dtype)).latent_dist.mode()[:, :, 0].float()
        assert torch.equal(latents, (expected - mean) / std)
        frames = (latents * std + mean)[:, :, None].to(dtype)
        assert torch.equal(run.arch.codec.decode(vae, latents), vae.decode(frames).sample[:, :, 0].float())


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 3.0), (4.0, 1.5)])
def test_previews_match_diffusers(run: Any, encoded: dict[str, Tensor], scale: float, shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    prompt = Prompt(
        text=CAPTIONS[0], negative="", width=64, height=96, seed=7, num_steps=4, scale=scale, sampler=None,
        guidance_scale=None, cfg_trunc_ratio=None, renorm_cfg=None, flow_shift=shift,
    )  # fmt: skip
    transformer, conditioner = diffusers_models(run.models.denoiser)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / prompt.num_steps, prompt.num_steps))
    latents = torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        texts = [
            conditioner(
                encoded[f"{part}qwen_prompt_embeds"][:1],
                encoded[f"{part}t5_input_ids"][:1],
                target_attention_mask=encoded[f"{part}t5_attention_mask"][:1],
                source_attention_mask=encoded[f"{part}qwen_attention_mask"][:1],
            )
            for part in ("", "negative_")
        ]
        for timestep in scheduler.timesteps:
            cond, uncond = (oracle_velocity(transformer, latents, timestep[None] / 1000, text) for text in texts)
            latents = scheduler.step(uncond + scale * (cond - uncond), timestep, latents).prev_sample
    torch.testing.assert_close(ours(run, prompt), latents, **FLOAT32_SAMPLED)
