"""Images that a preview prompt names: one to inpaint, and reference images of an edit model."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import nn

from library.data.decoding.images import Pixels, apply_placement, crop_at_centre, read_pixels, with_alpha
from library.data.decoding.tensors import to_pixels
from library.data.description.buckets import ReferenceRules, Shape, cover
from library.data.plan.dataset_digest import whole_digest
from library.diffusion.inpainting import draw_mask
from library.protocols import Architecture, LatentSpec
from library.training.step.context import StepContext
from library.training.step.latents import encode_masked, load_references
from library.types import Batch, CaptionWithImages, Conditioning, Prompt

OPAQUE = 128  # smallest alpha value that keeps a pixel; lower ones are inpainted
GAP = 4  # pixels between images shown side by side


def prompt_conditioning(
    context: StepContext, vae: nn.Module | None, prompt: Prompt, batch: Batch, seed: int
) -> Conditioning:
    """Return the conditioning from a prompt's images; empty without images.

    `batch` holds the prompt. `vae` encodes reference images, because the context of a run with cached latents has no
    VAE. Raises UserError for an image that cannot be read.
    """
    if not prompt.reference_paths:
        return inpainting_feature(context, prompt, batch, seed)
    pixels = tuple(to_pixels(reference)[None] for reference in read_placed_references(prompt, context.arch.codec.spec))
    with_vae = replace(context, models=replace(context.models, vae=vae))
    references = load_references(with_vae, replace(batch, reference_pixels=pixels))
    return {**references, **inpainting_feature(context, prompt, batch, seed)}


def read_placed_references(prompt: Prompt, spec: LatentSpec) -> list[Pixels]:
    """Read a prompt's reference images, resized to about its area with their own aspect ratios and sides that are
    multiples of the bucket step."""
    rules, placed = ReferenceRules((prompt.width, prompt.height), False, spec.bucket_step), []
    for path in prompt.reference_paths:
        rgb, alpha = read_pixels(str(path))
        size = rgb.shape[1], rgb.shape[0]
        pixels = with_alpha(rgb, alpha) if spec.has_alpha else rgb
        placed.append(apply_placement(pixels, crop_at_centre(rules.shape(size, size, Shape(size, size))), None))
    return placed


def resolve_seen_text(prompt: Prompt, text: str, arch: Architecture) -> str:
    """Return a prompt's text for the text encoder, with the reference images if the encoder sees them."""
    if not prompt.reference_paths or arch.text_cache is None or not arch.text_cache.sees_images:
        return text
    digest = f"{[whole_digest(str(path)) for path in prompt.reference_paths]} {prompt.width}x{prompt.height}"
    return CaptionWithImages(
        text, digest, lambda: tuple(map(to_pixels, read_placed_references(prompt, arch.codec.spec)))
    )


def show_beside(references: Sequence[Image.Image], image: Image.Image) -> Image.Image:
    """Return an image with its reference images on the left, at its height."""
    scaled = [
        tile.resize((max(1, round(tile.width * image.height / tile.height)), image.height)) for tile in references
    ]
    row = Image.new(image.mode, (sum(tile.width + GAP for tile in scaled) + image.width, image.height))
    left = 0
    for tile in (*scaled, image):
        row.paste(tile, (left, 0))
        left += tile.width + GAP
    return row


def show_with_references(prompt: Prompt, image: Image.Image, spec: LatentSpec) -> Image.Image:
    """Return a prompt's image with its reference images on the left; unchanged if it has none."""
    references = [Image.fromarray(pixels) for pixels in read_placed_references(prompt, spec)]
    return show_beside(references, image) if references else image


def inpainting_feature(context: StepContext, prompt: Prompt, batch: Batch, seed: int) -> Conditioning:
    """Return the conditioning of an inpainting model for a prompt's image, cropped to its size; empty for other models.

    Transparent pixels are inpainted; without any, a random part that follows from `seed`.
    """
    if prompt.image_path is None:
        return {}
    rgb, alpha = read_pixels(str(prompt.image_path))
    size = prompt.width, prompt.height
    placement = crop_at_centre(Shape(size, cover((rgb.shape[1], rgb.shape[0]), size)))
    if alpha is None or alpha.min() >= OPAQUE:
        mask_HW = draw_mask(*size, np.random.default_rng(seed))
    else:
        mask_HW = (apply_placement(alpha, placement, None) < OPAQUE).astype(np.float32)
    image_batch = replace(batch, pixels_BCHW=to_pixels(apply_placement(rgb, placement, None))[None])
    masks_B1HW = torch.from_numpy(mask_HW)[None, None]
    return encode_masked(context, image_batch, masks_B1HW, lambda _: torch.Generator().manual_seed(seed))
