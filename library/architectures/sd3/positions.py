"""Positions scaled to the resolutions of a data set (`enable_scaled_pos_embed`).

Letters: h and w sides of an image in patches, s side of a resolution in patches, M width of the model.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

BASE_SIZE = 16  # a square image of any resolution spans this many units
TABLE_RATIO = 1.5  # side of the table relative to the resolution, with a margin for elongated and shifted images


def square_side(resolution: tuple[int, int], patch: int) -> int:
    """Return s of a resolution (width, height) in pixels: the side, in patches, of the square with its area."""
    return round(math.sqrt(resolution[0] * resolution[1])) // 8 // patch


def nearest_side(h: int, w: int, sides: Sequence[int]) -> int:
    """Return the s whose area is nearest to the image's, or the image's longer side if that table is too small."""
    ascending = sorted(set(sides))
    middles = [(a**2 + b**2) // 2 for a, b in pairwise(ascending)]
    side = next((s for s, limit in zip(ascending, middles, strict=False) if h * w <= limit), ascending[-1])
    return side if max(h, w) <= table_side(side) else max(h, w)


def table_side(side: int) -> int:
    """Return the side, in patches, of the table for a resolution of side s."""
    return int(side * TABLE_RATIO)


def scaled_positions(h: int, w: int, side: int, corner: tuple[int, int] | None, width: int) -> Tensor:
    """Return the positions of an image, (1, h w, M), from the table of resolution s at `corner`, None for its centre.

    They are sines and cosines as in the model's own table, columns first, of coordinates that run from 0 to 16 over a
    square image of the resolution, with margins on all sides.
    """
    full_side = table_side(side)
    top, left = ((full_side - h) // 2, (full_side - w) // 2) if corner is None else corner
    # float64, in which diffusers computes its table of sines and cosines.
    y_h, x_w = (
        (torch.arange(n, dtype=torch.float64) + start - (full_side - side) / 2) * BASE_SIZE / side
        for n, start in ((h, top), (w, left))
    )
    across = _waves(x_w, width // 2)[None, :].expand(h, -1, -1)
    down = _waves(y_h, width // 2)[:, None].expand(-1, w, -1)
    return torch.cat([across, down], dim=-1).flatten(0, 1)[None].float()


def _waves(values_N: Tensor, num_features: int) -> Tensor:
    """Return sines, then cosines, of decreasing frequencies, shape (N, F), in the dtype of the values."""
    half = num_features // 2
    angles = values_N[:, None] / 10_000 ** (torch.arange(half, dtype=values_N.dtype) / half)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)
