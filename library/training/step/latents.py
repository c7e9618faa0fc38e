"""The latents of a batch's images, of their references, and for inpainting models of what is left under a mask."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from library.diffusion.inpainting import FEATURE, blank, draw_mask, mask_channels
from library.diffusion.references import reference_features
from library.errors import UserError
from library.memory.devices import send
from library.randomness import generator_for, stream_seed
from library.training.step.context import StepContext
from library.types import Batch, Conditioning

Place = tuple[str | int, ...]
"""Names an image's stream of random numbers."""


def load_latents(
    context: StepContext, batch: Batch, generator_of: Callable[[int], torch.Generator], is_checked: bool = True
) -> Tensor:
    """Return the batch's latents, float32 on the device: from the cache, or encoded here without gradient.

    `generator_of(place)` draws the posterior's sample of the image at that place of the batch.
    Raises UserError naming the images where the VAE gives NaN; to find that out the host waits for the device.
    """
    if batch.latents_BCHW is not None:
        return send(batch.latents_BCHW, context.device).float()
    assert batch.pixels_BCHW is not None
    generators = [generator_of(place) for place in range(len(batch.keys))]
    latents_BCHW = encode(context, batch.pixels_BCHW, generators)
    if is_checked and not latents_BCHW.isfinite().all():
        broken = [key for key, one in zip(batch.keys, latents_BCHW, strict=True) if not one.isfinite().all()]
        raise UserError(f"the VAE gives NaN for {', '.join(broken)}; add --no_half_vae, or use a VAE made for fp16")
    return latents_BCHW


def encode(context: StepContext, pixels_BCHW: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """Return what `LatentCodec.encode` gives, float32 on the device without gradient, a few images at a time."""
    vae, count, parts = context.models.vae, context.vae_batch_size, []
    assert vae is not None
    with torch.no_grad():
        for first in range(0, len(pixels_BCHW), count):
            some = slice(first, first + count)
            pixels = send(pixels_BCHW[some], context.device)
            parts.append(context.arch.codec.encode(vae, pixels, None if generators is None else generators[some]))
    return torch.cat(parts).float()


def build_image_features(
    context: StepContext, batch: Batch, seed: int, place_of: Callable[[int], Place]
) -> Conditioning:
    """Return the features of images beside the noisy ones: reference images, and what `build_inpainting` gives."""
    return {**load_references(context, batch), **build_inpainting(context, batch, seed, place_of)}


def load_references(context: StepContext, batch: Batch) -> Conditioning:
    """Return the latents of the batch's reference images, normalized, on the device; nothing about them is random."""
    latents = [send(one, context.device).float() for one in batch.reference_latents]
    latents += [encode(context, one, None) for one in batch.reference_pixels]
    return reference_features([context.arch.codec.normalize(one) for one in latents])


def build_inpainting(context: StepContext, batch: Batch, seed: int, place_of: Callable[[int], Place]) -> Conditioning:
    """Return the conditioning of an inpainting model, each image with a mask of its own; empty for other models.

    `place_of(i)` names the stream of the image at place i: in training another one in every batch, in validation
    always the same.
    """
    if not context.arch.inpaints:
        return {}
    assert batch.pixels_BCHW is not None, "--train_inpainting is refused with cached latents"
    height, width = batch.pixels_BCHW.shape[-2:]
    rngs = [np.random.default_rng(stream_seed(seed, "mask", *place_of(i))) for i in range(len(batch.keys))]
    masks_B1HW = torch.from_numpy(np.stack([draw_mask(width, height, rng)[None] for rng in rngs]))
    return masked_feature(context, batch, masks_B1HW, lambda i: generator_for(seed, "kept", *place_of(i)))


def masked_feature(
    context: StepContext, batch: Batch, masks_B1HW: Tensor, generator_of: Callable[[int], torch.Generator]
) -> Conditioning:
    """Encode what these masks leave, 1 where an image is painted anew; `generator_of` is that of `load_latents`."""
    assert batch.pixels_BCHW is not None
    kept = replace(batch, pixels_BCHW=blank(batch.pixels_BCHW, masks_B1HW))
    latents_BCHW = context.arch.codec.normalize(load_latents(context, kept, generator_of))
    return {FEATURE: mask_channels(send(masks_B1HW, context.device), latents_BCHW)}
