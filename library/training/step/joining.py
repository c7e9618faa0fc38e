"""Concatenation of batches, latents and conditioning for a shared pass."""

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from library.types import Batch, Conditioning, Noised


def join_noised(parts: Sequence[Noised]) -> Noised:
    """Concatenate noised latents along the batch axis."""
    return Noised(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Noised)})


def join_conditioning(parts: Sequence[Conditioning]) -> Conditioning:
    """Concatenate conditioning along the batch axis."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def repeat_batch(batch: Batch, count: int) -> Batch:
    """Repeat a batch `count` times; images and latents are left out, because they are noised before."""

    def repeat(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.cat([tensor] * count)

    features = batch.conditioning
    return replace(
        batch,
        keys=batch.keys * count,
        captions=batch.captions * count,
        pixels_BCHW=None,
        latents_BCHW=None,
        reference_pixels=(),
        reference_latents=(),
        are_pairs=False,
        conditioning=None if features is None else {name: torch.cat([t] * count) for name, t in features.items()},
        loss_weights_B=torch.cat([batch.loss_weights_B] * count),
        masks_B1HW=repeat(batch.masks_B1HW),
        sizes_B6=torch.cat([batch.sizes_B6] * count),
        attributes=batch.attributes * count,
        crops_B2=repeat(batch.crops_B2),
    )
