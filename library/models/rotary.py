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


class AxisTables:
    """Cosines and sines for the positions of one axis, each table made on the host once and kept on its device.

    A model has its own: the planner runs models whose tables have no values. One of 128 positions takes 28 kB.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[int, int, float, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, width: int, extent: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """For the positions 0 to `extent` - 1, each of shape (extent, width / 2)."""
        asked = (width, extent, base, device)
        if asked not in self.kept:
            cos, sin = axis_table(width, extent, base)
            self.kept[asked] = send(cos, device), send(sin, device)
        return self.kept[asked]


class Rotary:
    """The angles of tokens along axes of which axis a turns `widths[a]` values of a head, an even number."""

    def __init__(self, widths: Sequence[int], base: int = ROPE_BASE) -> None:
        self.widths = widths
        self.base = base
        self.tables = AxisTables()

    def __call__(self, positions: Tensor, extents: Sequence[int]) -> Rope:
        """Of tokens at whole `positions` (..., T, A), which are below `extents[a]`, on their device."""
        places = positions.long().unbind(-1)
        turned = [
            [part[place] for part in self.tables(width, extent, self.base, positions.device)]
            for width, extent, place in zip(self.widths, extents, places, strict=True)
        ]
        cos, sin = (torch.cat(parts, dim=-1) for parts in zip(*turned, strict=True))
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
