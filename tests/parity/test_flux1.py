"""FLUX.1 and its Kontext form against diffusers' model and pipelines with the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.flux.model import PATCH, Flux
from library.architectures.flux.predict import predict
from library.architectures.flux.reference import diffusers_model
from library.diffusion.references import reference_features, references_in
from library.models.patches import patchify
from library.models.vae.flux import map_latents
from library.types import Noised, Prompt
from tests.parity.test_preview import ours
from tests.parity.tiny_models import open_run
from tests.tiny.flux import NUM_TEXT, build_tiny_flux, inputs, oracle_output, tiny_flux, tiny_vae
from tests.tolerances import FLOAT32_DEEP, FLOAT32_SAME_MATH, FLOAT32_SAMPLED


def test_masked_tokens_have_no_effect() -> None:
    """All text shares one position, so omitting padding gives the same result; diffusers gets the short text."""
    ours = tiny_flux(2)
    theirs = diffusers_model(ours)
    latents, sigmas, text, pooled, guidance = (value.detach() for value in inputs(8, 6))
    mask = torch.ones(2, NUM_TEXT)
    mask[:, 4:] = 0
    masked = ours(latents, sigmas, text, pooled, guidance, mask)
    short = oracle_output(theirs, latents, sigmas, text[:, :4], pooled, guidance)
    torch.testing.assert_close(patchify(masked, PATCH), short, **FLOAT32_DEEP)
    assert not torch.allclose(masked, ours(latents, sigmas, text, pooled, guidance), rtol=1e-2)
    uneven = mask.clone()
    uneven[1, 4:] = 1  # each sample has its own mask
    both = ours(latents, sigmas, text, pooled, guidance, uneven)
    torch.testing.assert_close(both[0], masked[0], **FLOAT32_DEEP)
    torch.testing.assert_close(both[1], ours(latents, sigmas, text, pooled, guidance)[1], **FLOAT32_DEEP)


# FLUX.1's previews against diffusers' FluxPipeline: the same folder, prompts and seed, from text to latents.

NUM_TOKENS = 24


def run_of(arguments: list[str]) -> Any:
    return open_run("flux", [*arguments, "--t5xxl_max_token_length", str(NUM_TOKENS), "--model_prediction_type", "raw"])


def pipeline_of(folder: Path, is_shifted: bool) -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=is_shifted, shift=3.0 if is_shifted else 1.0, base_shift=0.5, max_shift=1.15
        ),
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(folder / "text_encoder_2"),
        tokenizer_2=T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
        transformer=FluxTransformer2DModel.from_pretrained(folder / "transformer"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("has_guidance", "scale"), [(True, 1.0), (True, 2.5), (False, 1.0)], ids=["dev", "dev with negative", "schnell"]
)
def test_latents_equal_those_of_the_pipeline(tmp_path: Path, has_guidance: bool, scale: float) -> None:
    arguments = build_tiny_flux(tmp_path, 9, "diffusers", has_guidance)
    prompt = Prompt(
        text="a red cat", negative="dog", width=64, height=96, seed=7, num_steps=4, scale=scale, sampler=None,
        guidance_scale=2.0 if has_guidance else None, cfg_trunc_ratio=None, renorm_cfg=None, flow_shift=None,
    )  # fmt: skip
    expected = pipeline_of(tmp_path, is_shifted=has_guidance)(
        prompt.text, negative_prompt=prompt.negative if scale > 1 else None, true_cfg_scale=scale, width=prompt.width,
        height=prompt.height, num_inference_steps=prompt.num_steps, guidance_scale=2.0,
        generator=torch.Generator().manual_seed(7), max_sequence_length=NUM_TOKENS, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(patchify(ours(run_of(arguments), prompt), PATCH), expected, **FLOAT32_SAMPLED)


# FLUX.1 Kontext's reference tokens against the pipeline and transformer of diffusers.

SIZES = [((8, 8), (8, 8)), ((4, 14), (10, 6)), ((12, 6), (4, 20))]  # of the latent and of its reference


def kontext_output(
    theirs: Any, latents: Tensor, sigmas: Tensor, text: Tensor, pooled: Tensor, guidance: Tensor, reference: Tensor
) -> Tensor:
    """Return diffusers' velocity as patches; FluxKontextPipeline concatenates the tokens and crops the prediction."""
    from diffusers import FluxKontextPipeline as Kontext

    def pack(image: Tensor) -> Tensor:
        return Kontext._pack_latents(image, *image.shape)

    def ids(image: Tensor) -> Tensor:
        h, w = (side // 2 for side in image.shape[-2:])
        return Kontext._prepare_latent_image_ids(len(image), h, w, image.device, torch.float32)

    reference_ids = ids(reference)
    reference_ids[..., 0] = 1
    output = theirs(
        torch.cat([pack(latents), pack(reference)], dim=1),
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=sigmas,
        guidance=guidance,
        img_ids=torch.cat([ids(latents), reference_ids]),
        txt_ids=torch.zeros(text.shape[1], 3),
    ).sample
    return output[:, : pack(latents).shape[1]]


def our_output(
    ours: Flux, latents: Tensor, sigmas: Tensor, text: Tensor, pooled: Tensor, guidance: Tensor, reference: Tensor
) -> Tensor:
    """Return the velocity of `predict` as patches, with the reference in the conditioning."""
    noised = Noised(latents, latents, latents, sigmas, sigmas)
    conditioning = {"t5_out": text, "l_pooled": pooled, **reference_features([reference])}
    batch: Any = None
    return patchify(predict(ours, noised, conditioning, batch, guidance=float(guidance[0]), masks_text=False), PATCH)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_and_gradients_match_diffusers(size: tuple[tuple[int, int], tuple[int, int]]) -> None:
    ours = tiny_flux(11)
    theirs = diffusers_model(ours)
    results = []
    for run, model in ((our_output, ours), (kontext_output, theirs)):
        latents, sigmas, text, pooled, _ = inputs(*size[0], seed=4)
        reference = torch.randn(2, 16, *size[1], generator=torch.Generator().manual_seed(8)).requires_grad_()
        output = run(model, latents, sigmas, text, pooled, torch.full((2,), 2.5), reference)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        gradients = torch.autograd.grad((output * weights).sum(), (latents, text, pooled, reference))
        results.append((output, *gradients))
    for ours_value, theirs_value in zip(*results, strict=True):
        assert theirs_value.abs().max() > 0.01
        torch.testing.assert_close(ours_value, theirs_value, **FLOAT32_DEEP)


def test_masked_text_leaves_all_image_tokens_visible() -> None:
    ours = tiny_flux(12)
    latents, sigmas, text, pooled, guidance = (value.detach() for value in inputs(8, 6))
    reference = torch.randn(2, 16, 4, 6, generator=torch.Generator().manual_seed(9))
    mask = torch.ones(2, text.shape[1])
    mask[:, 4:] = 0
    masked = ours(latents, sigmas, text, pooled, guidance, mask, [reference])
    short = kontext_output(diffusers_model(ours), latents, sigmas, text[:, :4], pooled, guidance, reference)
    torch.testing.assert_close(patchify(masked, PATCH), short, **FLOAT32_DEEP)


def test_references_keep_their_order_among_other_features() -> None:
    latents = [torch.full((1,), float(r)) for r in range(12)]
    references = references_in({"t5_out": torch.zeros(1), **reference_features(latents), "l_pooled": torch.zeros(1)})
    assert [int(reference) for reference in references] == list(range(12))


def test_references_use_the_mode_of_the_posterior_as_in_the_pipeline() -> None:
    from diffusers import AutoencoderKL
    from diffusers.pipelines.flux.pipeline_flux_kontext import retrieve_latents

    config, state = tiny_vae(3)
    vae = AutoencoderKL.from_config(config)
    vae.load_state_dict(state)
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        latents = retrieve_latents(vae.encode(pixels), sample_mode="argmax")
        expected = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        actual = map_latents("_x.npz").encode(vae.eval(), pixels, None)
    torch.testing.assert_close(actual, expected, **FLOAT32_SAME_MATH)
