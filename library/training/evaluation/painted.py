"""Previews of models that inpaint: the image that a prompt names, painted anew in part."""

from dataclasses import replace

import numpy as np
import torch

from library.data.decoding.images import centred, place, read_pixels
from library.data.decoding.tensors import to_pixels
from library.data.description.buckets import Shape, cover
from library.diffusion.inpainting import draw_mask
from library.training.step.context import StepContext
from library.training.step.latents import masked_feature
from library.types import Batch, Conditioning, Prompt

OPAQUE = 128  # of an alpha channel, and above; what is below is painted anew


def prompt_conditioning(context: StepContext, prompt: Prompt, batch: Batch, seed: int) -> Conditioning:
    """Return the conditioning of an inpainting model for a prompt's image, cut to its size; empty for other models.

    What is transparent is painted anew; where nothing is, a random part that follows from `seed`. `batch` holds the
    prompt. Raises UserError for an image that cannot be read.
    """
    if prompt.image_path is None:
        return {}
    rgb, alpha = read_pixels(str(prompt.image_path))
    size = prompt.width, prompt.height
    placement = centred(Shape(size, cover((rgb.shape[1], rgb.shape[0]), size)))
    if alpha is None or alpha.min() >= OPAQUE:
        mask_HW = draw_mask(*size, np.random.default_rng(seed))
    else:
        mask_HW = (place(alpha, placement, None) < OPAQUE).astype(np.float32)
    shown = replace(batch, pixels_BCHW=to_pixels(place(rgb, placement, None))[None])
    masks_B1HW = torch.from_numpy(mask_HW)[None, None]
    return masked_feature(context, shown, masks_B1HW, lambda _: torch.Generator().manual_seed(seed))
