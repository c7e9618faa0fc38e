"""Rotary positions as in Cosmos: value i of a head is paired with value i + D / 2.

Letters: T tokens, D head width, N heads, B samples, h and w sides in patches.
"""

import torch
from torch import Tensor

from library.models.rotary import AxisTables

BASE = 10_000
STRETCH = 4.0  # NTK scaling of rows and columns: four times the range of the first Cosmos

Angles = tuple[Tensor, Tensor]
"""Cosines and sines of the angle of each pair, float32, shape (T, D / 2)."""


def split_head(head_width: int) -> tuple[int, int, int]:
    """Return the number of values of a head that rotate with (frame, row, column): 44, 42 and 42 of 128."""
    spatial = head_width // 6 * 2
    return head_width - 2 * spatial, spatial, spatial


def image_angles(tables: AxisTables, head_width: int, h: int, w: int, device: torch.device) -> Angles:
    """Return the angles of an image's patches in row order. The image is frame 0, whose values do not rotate."""
    frame_width, side_width, _ = split_head(head_width)
    base = float(BASE * STRETCH ** (side_width / (side_width - 2)))  # extends the range by STRETCH (NTK-aware scaling)
    rows, columns = tables(side_width, h, base, device), tables(side_width, w, base, device)
    cos_of_row, sin_of_row = (table.repeat_interleave(w, 0) for table in rows)
    cos_of_column, sin_of_column = (table.repeat(h, 1) for table in columns)
    zeros = torch.zeros(h * w, frame_width // 2, device=device)
    return torch.cat([zeros + 1, cos_of_row, cos_of_column], -1), torch.cat([zeros, sin_of_row, sin_of_column], -1)


def text_angles(tables: AxisTables, head_width: int, num_tokens: int, device: torch.device) -> Angles:
    """Return the angles of tokens in a sequence."""
    return tables(head_width, num_tokens, BASE, device)


def apply_rope(x_BNTD: Tensor, angles: Angles) -> Tensor:
    """Rotate each pair of values of a head by its angle."""
    cos, sin = angles
    first, second = x_BNTD.float().chunk(2, dim=-1)
    rotated = torch.cat([cos * first - sin * second, sin * first + cos * second], dim=-1)
    return rotated.to(x_BNTD.dtype)
