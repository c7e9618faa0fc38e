"""Chroma against diffusers' ChromaTransformer2DModel and pipeline with the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from library.architectures.flux.model import PATCH
from library.architectures.flux.predict import with_first_padding
from library.models.patches import patchify
from library.types import Prompt
from tests.parity.test_preview import ours
from tests.parity.tiny_models import open_run
from tests.tiny.chroma import NUM_TEXT as CHROMA_TOKENS
from tests.tiny.chroma import build_tiny_chroma, oracle_output, tiny_chroma, velocity
from tests.tiny.chroma import inputs as chroma_inputs
from tests.tolerances import FLOAT32_DEEP, FLOAT32_SAMPLED


def test_one_padding_token_after_the_caption_is_attended_to() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert with_first_padding(mask).int().tolist() == expected


def test_masked_tokens_have_no_effect() -> None:
    model = tiny_chroma(22)
    latents, sigmas, text = (value.detach() for value in chroma_inputs(8, 6, 1))
    mask = (torch.arange(CHROMA_TOKENS) < 4).expand(2, -1)
    torch.testing.assert_close(
        velocity(model, latents, sigmas, text, mask), velocity(model, latents, sigmas, text[:, :4]), **FLOAT32_DEEP
    )
    assert not torch.allclose(velocity(model, latents, sigmas, text), velocity(model, latents, sigmas, text, mask))


def test_guidance_is_an_input() -> None:
    """diffusers fixes it to 0; the model accepts any value."""
    model = tiny_chroma(23)
    latents, sigmas, text = (value.detach() for value in chroma_inputs(6, 6, 2))
    guided = model(latents, sigmas, text, None, torch.full_like(sigmas, 3.5))
    assert not torch.allclose(patchify(guided, PATCH), velocity(model, latents, sigmas, text), rtol=1e-3)


def test_the_approximator_needs_no_gradient_unless_it_is_trained() -> None:
    model = tiny_chroma(26)
    rows = model.modulation(torch.tensor([0.5]), None, torch.zeros(1), torch.float32)
    assert not any(row.requires_grad for row in rows)
    model.distilled_guidance_layer.layers[1].in_layer.weight.requires_grad_()
    rows = model.modulation(torch.tensor([0.5]), None, torch.zeros(1), torch.float32)
    assert all(row.requires_grad for row in rows)


# Chroma's previews and loss against diffusers' ChromaPipeline: the same folder, captions and seed, text to latents.

NUM_TOKENS = 20


def run_of(arguments: list[str]) -> Any:
    return open_run("chroma", [*arguments, "--t5xxl_max_token_length", "20"])


def pipeline_of(folder: Path) -> Any:
    from diffusers import AutoencoderKL, ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import T5EncoderModel, T5TokenizerFast

    pipeline = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=T5EncoderModel.from_pretrained(folder / "text_encoder"),
        tokenizer=T5TokenizerFast.from_pretrained(folder / "tokenizer"),
        transformer=ChromaTransformer2DModel.from_pretrained(folder / "transformer"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("scale", "negative"), [(1.0, ""), (4.0, ""), (2.5, "a dog")], ids=str)
def test_latents_equal_those_of_the_pipeline(tmp_path: Path, scale: float, negative: str) -> None:
    """Use the pipeline's captions and masks. It converts masks to the text's precision, which torch adds to the scores
    instead of masking; the model's authors mask, so the masks are passed as booleans here."""
    arguments = build_tiny_chroma(tmp_path, 12, "diffusers")
    prompt = Prompt(
        text="a red cat", negative=negative, width=64, height=96, seed=8, num_steps=4, scale=scale, sampler=None,
        guidance_scale=0.0, cfg_trunc_ratio=None, renorm_cfg=None, flow_shift=None,
    )  # fmt: skip
    pipeline = pipeline_of(tmp_path)
    with torch.no_grad():
        texts = [pipeline._get_t5_prompt_embeds(text, 1, NUM_TOKENS) for text in (prompt.text, negative)]
    assert texts[0][1].sum() != texts[1][1].sum(), "captions of two lengths"
    expected = pipeline(
        prompt_embeds=texts[0][0], prompt_attention_mask=texts[0][1].bool(),
        negative_prompt_embeds=texts[1][0], negative_prompt_attention_mask=texts[1][1].bool(),
        guidance_scale=scale, width=prompt.width, height=prompt.height, num_inference_steps=prompt.num_steps,
        generator=torch.Generator().manual_seed(8), output_type="latent",
    ).images  # fmt: skip
    actual = ours(run_of(arguments), prompt)
    torch.testing.assert_close(patchify(actual, PATCH), expected, **FLOAT32_SAMPLED)


def test_the_loss_of_a_step_matches_diffusers(tmp_path: Path) -> None:
    """The expected loss is the mean square of noise - latent - prediction, summed in float64."""
    recipe = ["--guidance_scale", "0", "--timestep_sampling", "sigmoid", "--model_prediction_type", "raw"]
    arch = run_of([*build_tiny_chroma(tmp_path, 14, "diffusers"), *recipe]).arch
    captions = ["a red cat", "dog"]
    generator = torch.Generator().manual_seed(15)
    clean = torch.randn(2, 16, 10, 6, generator=generator)
    with torch.no_grad():
        conditioning = arch.text.encode(arch.load.text_encoders(), arch.text.tokenize(captions))
        noised = arch.objective.corrupt(clean, generator)
        output = arch.predict(arch.load.denoiser(), noised, conditioning, None)
        loss = arch.objective.loss(arch.objective.estimate(output, noised), arch.objective.target(noised), noised)
        pipeline = pipeline_of(tmp_path)
        text, mask = pipeline._get_t5_prompt_embeds(captions, 1, NUM_TOKENS)
        theirs = oracle_output(pipeline.transformer, noised.latents_BCHW, noised.sigmas_B, text, mask.bool())
    missing = theirs.double() - patchify(noised.noise_BCHW - clean, PATCH).double()
    assert loss.mean().item() == pytest.approx(missing.square().mean().item(), rel=1e-5)  # float32 through two blocks
    assert noised.sigmas_B[0] != noised.sigmas_B[1]


def test_prompts_use_classifier_free_guidance_by_default(tmp_path: Path) -> None:
    defaults = run_of(build_tiny_chroma(tmp_path, 13)).arch.preview.defaults
    assert (defaults.scale, defaults.guidance_scale) == (4.0, 0.0)
