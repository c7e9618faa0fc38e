"""Image pairs: the preference loss, and the two sides of a slider (Gandikota et al. 2023, "Concept Sliders").

A partner is carried as the image's reference image, but never passed to the denoiser as one.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from library.diffusion.dpo import preference_losses
from library.protocols import Objective
from library.training.step.context import StepContext
from library.training.step.joining import join_conditioning, join_noised, repeat_batch
from library.training.step.masks import compute_masked_means
from library.types import Batch, Conditioning, Noised


def prefers(context: StepContext, batch: Batch) -> bool:
    """Return True if the batch's images are trained as preferred over their partners."""
    return context.pairs.preference_loss is not None and batch.are_pairs


def split_pairs(batch: Batch) -> tuple[Batch, Batch]:
    """Split a batch of pairs into one of images and one of partners."""
    pixels = batch.reference_pixels[0] if batch.reference_pixels else None
    latents = batch.reference_latents[0] if batch.reference_latents else None
    images = replace(batch, reference_pixels=(), reference_latents=(), are_pairs=False)
    return images, replace(images, pixels_BCHW=pixels, latents_BCHW=latents)


def split_passes(context: StepContext, batch: Batch) -> Iterator[Batch]:
    """Yield the batches that need a forward and backward pass: the batch, or each side of a slider's pairs.

    The adapter keeps a side's strength until the next side is requested, because the backward pass may recompute its
    layers. Each side has half the weight of an image.
    """
    strength = context.pairs.pair_slider
    if strength is None or not batch.are_pairs:
        yield batch
        return
    try:
        for side, multiplier in zip(split_pairs(batch), (strength, -strength), strict=True):
            context.network.set_multiplier(multiplier)
            yield replace(side, loss_weights_B=batch.loss_weights_B / 2)
    finally:
        context.network.set_multiplier(1.0)


def losses_of_pairs(
    context: StepContext,
    objective: Objective,
    batch: Batch,
    noised: Sequence[Noised],
    condition: Callable[[], Conditioning],
) -> Tensor:
    """Return the preference loss of each pair, shape P.

    `noised` holds the images and their partners with the same noise; `condition` returns the text conditioning of P
    captions. The reference is the base model with the adapter switched off, so no second model is loaded.
    """
    pair_batch, joined = repeat_batch(batch, 2), join_noised(noised)

    def errors() -> Tensor:
        with context.autocast():
            conditioning = condition()
            conditioning = join_conditioning([conditioning, conditioning])
            output_BCHW = context.arch.predict(context.models.denoiser, joined, conditioning, pair_batch)
            prediction_BCHW = objective.estimate(output_BCHW, joined)
        loss_BCHW = objective.loss(prediction_BCHW, objective.target(joined), joined)
        return compute_masked_means(loss_BCHW, pair_batch.masks_B1HW)

    context.network.set_noise_levels(objective.noise_levels(joined))
    # The reference comes first, while no activations are kept for the backward pass.
    context.network.set_multiplier(0.0)
    try:
        with torch.no_grad():
            reference_2P = errors()
    finally:
        context.network.set_multiplier(1.0)
    return preference_losses(errors(), reference_2P, context.pairs.preference_beta)
