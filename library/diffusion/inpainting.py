"""Random inpainting masks, and the extra input channels of an inpainting model.

The channels are ordered as in diffusers' pipelines for 9-channel U-Nets. Letters: B images, C channels; H height and W
width in pixels; h and w those of the latents.
"""

from math import cos, pi, sin

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import interpolate

FEATURE = "inpainting"  # key in a batch's conditioning
MOST_CORNERS, MOST_SHAPES = 12, 4
LEAST_SHARE, MOST_SHARE = 0.1, 0.6  # share of the image covered by a cloud
COARSEST_GRID, NUM_OCTAVES = 3, 4

Mask = NDArray[np.float32]
"""(H, W), 1 where the image is to be repainted, 0 where it is kept."""


def draw_mask(width: int, height: int, rng: np.random.Generator) -> Mask:
    """Draw a cloud, a polygon, or several rectangles and ellipses with equal probability. Never empty, never the
    whole image."""
    mask = (draw_cloud, draw_polygon, draw_shapes)[rng.integers(3)](width, height, rng)
    return mask if 0 < mask.mean() < 1 else draw_cloud(width, height, rng)


def draw_cloud(width: int, height: int, rng: np.random.Generator) -> Mask:
    """Draw the peaks of fractal noise: a sum of random grids, each with twice the resolution and half the amplitude
    of the previous one."""
    noise_HW = np.zeros((height, width), np.float32)
    for octave in range(NUM_OCTAVES):
        grid = rng.standard_normal((COARSEST_GRID << octave, COARSEST_GRID << octave)).astype(np.float32)
        noise_HW += np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)) / 2**octave
    share = rng.uniform(LEAST_SHARE, MOST_SHARE)
    return (noise_HW > np.quantile(noise_HW, 1 - share)).astype(np.float32)


def draw_polygon(width: int, height: int, rng: np.random.Generator) -> Mask:
    """Draw a polygon whose corners surround a point at random distances."""
    x, y = rng.uniform(0.2, 0.8, 2)
    angles = np.sort(rng.uniform(0, 2 * pi, rng.integers(3, MOST_CORNERS + 1)))
    radii = rng.uniform(0.1, 0.5, len(angles))
    corners = [((x + r * cos(a)) * width, (y + r * sin(a)) * height) for a, r in zip(angles, radii, strict=True)]
    image, draw = _canvas(width, height)
    draw.polygon(corners, fill=1)
    return np.asarray(image, np.float32)


def draw_shapes(width: int, height: int, rng: np.random.Generator) -> Mask:
    """Draw rectangles and ellipses with sides of 10 to 50 % of the image's sides."""
    image, draw = _canvas(width, height)
    for _ in range(rng.integers(1, MOST_SHAPES + 1)):
        w, h = rng.uniform(0.1, 0.5, 2) * (width, height)
        left, top = rng.uniform(0, 1, 2) * (width - w, height - h)
        (draw.rectangle if rng.random() < 0.5 else draw.ellipse)((left, top, left + w, top + h), fill=1)
    return np.asarray(image, np.float32)


def _canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("L", (width, height))
    return image, ImageDraw.Draw(image)


def blank(pixels_BCHW: Tensor, masks_B1HW: Tensor) -> Tensor:
    """Return the images (-1..1) with the masked area grey (0)."""
    return pixels_BCHW * (1 - masks_B1HW)


def mask_channels(masks_B1HW: Tensor, kept_BChw: Tensor) -> Tensor:
    """Return the channels that are appended to the noisy latents, shape (B, 1 + C, h, w): the mask at the size of
    the latents, then the latents of the blanked image."""
    # "nearest" as in diffusers' pipelines, so that the mask stays 0 or 1.
    masks_B1hw = interpolate(masks_B1HW, size=kept_BChw.shape[-2:], mode="nearest")
    return torch.cat([masks_B1hw.to(kept_BChw), kept_BChw], 1)
