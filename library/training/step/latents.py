"""Latents of images and reference images, and the masked latents of inpainting models."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from library.base.errors import about, error_in
from library.base.randomness import generator_for, stream_seed
from library.diffusion.inpainting import FEATURE, blank, draw_mask, mask_channels
from library.diffusion.references import reference_features
from library.memory.devices import send
from library.training.step.context import StepContext
from library.types import Batch, Conditioning

Place = tuple[str | int, ...]
"""The name of an image's random stream."""


def load_latents(
    context: StepContext, batch: Batch, generator_of: Callable[[int], torch.Generator], is_checked: bool = True
) -> Tensor:
    """Return the batch's latents, float32 on the device, from the cache or encoded without gradient.

    `generator_of(place)` returns the generator for the VAE's posterior sample of the image at that position. Raises
    UserError naming the images for which the VAE returns NaN; this check synchronizes with the device.
    """
    if batch.latents_BCHW is not None:
        return send(batch.latents_BCHW, context.device).float()
    assert batch.pixels_BCHW is not None
    generators = [generator_of(place) for place in range(len(batch.keys))]
    latents_BCHW = encode(context, batch.pixels_BCHW, generators)
    if is_checked and not latents_BCHW.isfinite().all():
        damaged = [
            key for key, latents_CHW in zip(batch.keys, latents_BCHW, strict=True) if not latents_CHW.isfinite().all()
        ]
        raise error_in("--no_half_vae", cause="needs")(
            f"the VAE gives NaN for {', '.join(damaged)}", "add --no_half_vae, or use a VAE made for fp16"
        )
    return latents_BCHW


def encode(context: StepContext, pixels_BCHW: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
    """Encode images a few at a time. Return the result of `LatentCodec.encode`, float32 on the device, without
    gradient."""
    vae, count, parts = context.models.vae, context.vae_batch_size, []
    assert vae is not None
    with torch.no_grad():
        for start in range(0, len(pixels_BCHW), count):
            chunk = slice(start, start + count)
            pixels = send(pixels_BCHW[chunk], context.device)
            parts.append(context.arch.codec.encode(vae, pixels, None if generators is None else generators[chunk]))
    return torch.cat(parts).float()


def build_image_features(
    context: StepContext, batch: Batch, seed: int, place_of: Callable[[int], Place]
) -> Conditioning:
    """Return the conditioning that comes from images: reference latents and the features of `build_inpainting`."""
    return {**load_references(context, batch), **build_inpainting(context, batch, seed, place_of)}


def load_references(context: StepContext, batch: Batch) -> Conditioning:
    """Return the normalized latents of the batch's reference images on the device. They are not random."""
    latents = [send(reference, context.device).float() for reference in batch.reference_latents]
    # Without generators the VAE returns the mode of its posterior, as diffusers encodes reference images.
    latents += [encode(context, reference, None) for reference in batch.reference_pixels]
    return reference_features([context.arch.codec.normalize(reference) for reference in latents])


def build_inpainting(context: StepContext, batch: Batch, seed: int, place_of: Callable[[int], Place]) -> Conditioning:
    """Return the conditioning of an inpainting model, with one random mask per image; empty for other models.

    `place_of(i)` names the random stream of the image at position i: a new one for each training batch, a constant one
    in validation. Raises UserError for a batch of a --dataset_class that has no images.
    """
    if not context.arch.inpaints:
        return {}
    if batch.pixels_BCHW is None:  # cached latents are refused
        raise about("--train_inpainting", cause="needs")(
            "needs images, but --dataset_class gives `latents`", "give `images` instead"
        )
    height, width = batch.pixels_BCHW.shape[-2:]
    rngs = [np.random.default_rng(stream_seed(seed, "mask", *place_of(i))) for i in range(len(batch.keys))]
    masks_B1HW = torch.from_numpy(np.stack([draw_mask(width, height, rng)[None] for rng in rngs]))
    return encode_masked(context, batch, masks_B1HW, lambda i: generator_for(seed, "kept", *place_of(i)))


def encode_masked(
    context: StepContext, batch: Batch, masks_B1HW: Tensor, generator_of: Callable[[int], torch.Generator]
) -> Conditioning:
    """Encode images with their masked area removed; a mask is 1 where the model paints. `generator_of` is as in
    `load_latents`."""
    assert batch.pixels_BCHW is not None
    masked = replace(batch, pixels_BCHW=blank(batch.pixels_BCHW, masks_B1HW))
    latents_BCHW = context.arch.codec.normalize(load_latents(context, masked, generator_of))
    return {FEATURE: mask_channels(send(masks_B1HW, context.device), latents_BCHW)}
