"""Rotary positions (Su et al. 2021) along several axes, each turning a share of the values of a head.

Letters: T tokens, A axes, D head width, N heads, B samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from library.memory.devices import send

ROPE_BASE = 10_000

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of the angles that each pair of neighbouring values of a head turns by, float32 (..., T, D / 2)."""


def rope_of(positions: Tensor, widths: Sequence[int], extents: Sequence[int], base: int = ROPE_BASE) -> Rope:
    """The angles of tokens at whole `positions` (..., T, A), on their device.

    Axis a turns `widths[a]` values of a head, an even number, and its positions are below `extents[a]`.
    """
    tables = [axis_table(width, extent, base) for width, extent in zip(widths, extents, strict=True)]
    places = positions.long().unbind(-1)
    cos, sin = (
        torch.cat([send(table[kind], positions.device)[place] for table, place in zip(tables, places, strict=True)], -1)
        for kind in (0, 1)
    )
    return cos, sin


def axis_table(width: int, extent: int, base: float) -> Rope:
    """Cosines and sines for the positions 0 to `extent` - 1 of one axis, on the CPU, shape (extent, width / 2).

    The angles need float64, which not every device has: float32 is off by 1e-4 at position 1000.
    """
    frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(extent, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def turn(x_BNTD: Tensor, rope: Rope) -> Tensor:
    """Turn each pair of neighbouring values of a head by its angle; tables must broadcast to (B, N, T, D / 2)."""
    cos, sin = rope
    even, odd = x_BNTD.float().unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
    turned = torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1)
    return turned.flatten(-2).to(x_BNTD.dtype)
