"""Rotary positions (Su et al. 2021) along several axes, each turning a share of the values of a head.

Letters: T tokens, A axes, D head width, N heads, B samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ROPE_BASE = 10_000

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of the angles that each pair of neighbouring values of a head turns by, float32 (..., T, D / 2)."""


def rope_of(positions: Tensor, widths: Sequence[int], base: int = ROPE_BASE) -> Rope:
    """The angles of tokens at `positions` (..., T, A); axis a turns `widths[a]` values of a head, an even number."""
    angles = []
    for axis, width in enumerate(widths):
        exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
        angles.append(positions[..., axis, None].double() * base**-exponents)
    angles_TD = torch.cat(angles, dim=-1)
    return angles_TD.cos().float(), angles_TD.sin().float()


def turn(x_BNTD: Tensor, rope: Rope) -> Tensor:
    """Turn each pair of neighbouring values of a head by its angle; tables must broadcast to (B, N, T, D / 2)."""
    cos, sin = rope
    even, odd = x_BNTD.float().unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]
    turned = torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1)
    return turned.flatten(-2).to(x_BNTD.dtype)
