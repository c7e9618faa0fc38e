"""Latents and targets of batches that consist of prompts without images (LECO).

Sources: Gandikota et al. 2023, "Erasing Concepts from Diffusion Models"; 2023, "Concept Sliders". As in these papers,
no gradient flows through the denoising steps that produce the latents.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from library.base.randomness import generator_for
from library.diffusion.guidance import concept_target, guide, is_guided_at
from library.diffusion.samplers import DDPM_SAMPLER
from library.training.step.context import StepContext
from library.training.step.denoising import add_noise_at, denoise
from library.training.step.joining import join_noised, repeat_batch
from library.training.step.modes import eval_mode
from library.training.step.text_features import build_conditioning
from library.types import Batch, Concept, Noised, Prompt

Predictions = Mapping[str, Tensor]
"""The denoiser's output for each text, float32."""


def draw_partly(context: StepContext, batch: Batch, concept: Concept, batch_number: int) -> Noised:
    """Denoise the batch's latents with the adapted model for as many steps as the concept draws, and return them with
    their noise level.

    From here on the adapter has the concept's strength, because the backward pass may recompute its layers.
    """
    (caption,) = set(batch.captions)
    prompt = build_prompt(context, batch, concept.unconditional, concept.num_steps, concept.guidance)
    sampler = context.arch.preview.sampler(prompt)
    predict = build_predictor(context, batch, [caption])
    # At scale 1 guidance gives the prediction for the caption, whatever that for the other prompt is.
    predict_both = (
        predict if concept.guidance == 1 else build_predictor(context, batch, [concept.unconditional, caption])
    )

    def guided_prediction(noised: Noised, progress: float) -> Tensor:
        outputs = (predict_both if is_guided_at(prompt, progress) else predict)(noised)
        return guide(outputs[concept.unconditional], outputs[caption], prompt) if len(outputs) > 1 else outputs[caption]

    generator = generator_for(context.seed, "concept", batch_number)
    spec = context.arch.codec.spec
    height, width = (side // spec.downscale for side in batch.height_width)
    blank_BCHW = torch.zeros(len(batch.keys), spec.channels, height, width, device=context.device)
    noise_BCHW = context.arch.objective.draw_noise(blank_BCHW, generator)
    context.network.set_multiplier(concept.multiplier)
    # T-LoRA's ranks are masked by noise level in training alone; latents are drawn with all ranks, as previews are.
    context.network.set_noise_levels(None)
    with torch.no_grad(), eval_mode([context.network.module]):
        latents_BCHW = denoise(sampler, guided_prediction, sampler.start(noise_BCHW), generator, concept.num_denoised)
    assert latents_BCHW is not None
    index = concept.num_denoised
    return add_noise_at(sampler.levels[index], sampler.denoiser_input(latents_BCHW, index))


def compute_target(context: StepContext, batch: Batch, concept: Concept, noised: Noised) -> Tensor:
    """Compute the target of the denoiser's output, float32, from the base model's outputs for up to three prompts."""
    poles = [concept.positive, concept.unconditional] if concept.push else []
    context.network.set_multiplier(0.0)
    try:
        with torch.no_grad():
            outputs = build_predictor(context, batch, [concept.neutral, *poles])(noised)
    finally:
        context.network.set_multiplier(concept.multiplier)
    if not poles:
        return outputs[concept.neutral]
    return concept_target(
        outputs[concept.neutral], outputs[concept.positive], outputs[concept.unconditional], concept.push
    )


def build_predictor(context: StepContext, batch: Batch, texts: Sequence[str]) -> Callable[[Noised], Predictions]:
    """Return a function that predicts for several texts in one call of the denoiser; equal texts are predicted once."""
    texts = list(dict.fromkeys(texts))
    count, size = len(texts), len(batch.keys)
    repeated_batch = replace(repeat_batch(batch, count), captions=[text for text in texts for _ in range(size)])
    with torch.no_grad(), context.autocast():
        conditioning = build_conditioning(context, repeated_batch, {})

    def predict(noised: Noised) -> Predictions:
        repeated = join_noised([noised] * count)
        with context.autocast():
            output_BCHW = context.arch.predict(context.models.denoiser, repeated, conditioning, repeated_batch)
        return dict(zip(texts, output_BCHW.float().chunk(count), strict=True))

    return predict


def build_prompt(context: StepContext, batch: Batch, negative: str, num_steps: int, scale: float) -> Prompt:
    """Return the batch as a preview prompt, for the preview sampler."""
    defaults = context.arch.preview.defaults
    height, width = batch.height_width
    return Prompt(
        text=batch.captions[0],
        negative=negative,
        width=width,
        height=height,
        seed=None,
        num_steps=num_steps,
        scale=scale,
        sampler=None if defaults.sampler is None else DDPM_SAMPLER,
        guidance_scale=defaults.guidance_scale,
        cfg_trunc_ratio=defaults.cfg_trunc_ratio,
        renorm_cfg=defaults.renorm_cfg,
        flow_shift=defaults.flow_shift,
    )
