"""Rotary positions (Su et al. 2021) along several axes, each turning a share of the values of a head.

Letters: T tokens, A axes, D head width, N heads, B samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from library.memory.devices import send

ROPE_BASE = 10_000
HAVE_COMPLEX = ("cpu", "cuda")  # kinds of devices

Rope = Tensor
"""Cosine and sine of the angle that each pair of neighbouring values of a head turns by, float32 (..., T, D / 2, 2)."""


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
    return torch.stack([cos, sin], dim=-1)


def axis_table(width: int, extent: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines for the positions 0 to `extent` - 1 of one axis, on the CPU, shape (extent, width / 2).

    The angles need float64, which not every device has: float32 is off by 1e-4 at position 1000.
    """
    frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(extent, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def turn(x_BNTD: Tensor, rope: Rope) -> Tensor:
    """Turn each pair of neighbouring values of a head by its angle; the table must broadcast to (B, N, T, D / 2, 2).

    As products of complex numbers, which is one pass in place of seven; where they are not to be had, and in compiled
    code, which makes one pass of everything, as sums.
    """
    pairs = x_BNTD.float().unflatten(-1, (-1, 2))  # type: ignore[no-untyped-call]
    if x_BNTD.device.type in HAVE_COMPLEX and not torch.compiler.is_compiling():
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    else:
        (even, odd), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        turned = torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1)
    return turned.flatten(-2).to(x_BNTD.dtype)
