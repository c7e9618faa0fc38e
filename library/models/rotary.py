"""Rotary position embeddings (Su et al. 2021) along several axes, each rotating a share of a head's values.

Letters: T tokens, A axes, D head width, N heads, B samples.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from library.memory.devices import send

ROPE_BASE = 10_000
HAVE_COMPLEX = ("cpu", "cuda")  # device types with complex arithmetic

Rope = Tensor
"""Cosine and sine of each pair's rotation angle, float32 (..., T, D / 2, 2); a pair is two neighbouring values of a
head."""


class AxisTables:
    """Cosines and sines by position along one axis. Each table is computed once on the host and kept on its device.

    Each model has its own tables, because the planner runs models whose tables are fake. A table of 128 positions takes
    28 kB.
    """

    def __init__(self) -> None:
        self.kept: dict[tuple[int, int, float, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, width: int, extent: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the positions 0 to `extent` - 1, each (extent, width / 2)."""
        key = (width, extent, base, device)
        if key not in self.kept:
            cos, sin = axis_table(width, extent, base)
            self.kept[key] = send(cos, device), send(sin, device)
        return self.kept[key]


class Rotary:
    """Rotation angles of tokens along several axes; axis a rotates `widths[a]` values of a head, an even number."""

    def __init__(self, widths: Sequence[int], base: int = ROPE_BASE) -> None:
        self.widths = widths
        self.base = base
        self.tables = AxisTables()

    def __call__(self, positions: Tensor, extents: Sequence[int]) -> Rope:
        """Return the angles of tokens at integer `positions`, (..., T, A), on their device; those on axis a are
        below `extents[a]`."""
        indices = positions.long().unbind(-1)
        # Only tables of single positions are copied to the device, so that no copy grows with the image.
        axes = [
            [table[index] for table in self.tables(width, extent, self.base, positions.device)]
            for width, extent, index in zip(self.widths, extents, indices, strict=True)
        ]
        cos, sin = (torch.cat(parts, dim=-1) for parts in zip(*axes, strict=True))
        return torch.stack([cos, sin], dim=-1)


def axis_table(width: int, extent: int, base: float) -> tuple[Tensor, Tensor]:
    """Compute cosines and sines of the positions 0 to `extent` - 1 along an axis, on the CPU; (extent, width / 2)."""
    # The angles need float64, which not every device supports: float32 is off by 1e-4 at position 1000.
    frequencies = base ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(extent, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def apply_rope(x_BNTD: Tensor, rope: Rope) -> Tensor:
    """Rotate each pair of neighbouring values of a head by its angle; `rope` must broadcast to (B, N, T, D / 2, 2)."""
    # Complex multiplication takes one pass instead of seven, forward and backward 24 instead of 105 ms for 24 heads of
    # 1152 tokens on a CPU. Devices without it, and compiled code, which fuses the passes anyway, use real arithmetic.
    pairs = x_BNTD.float().unflatten(-1, (-1, 2))  # type: ignore[no-untyped-call]
    if x_BNTD.device.type in HAVE_COMPLEX and not torch.compiler.is_compiling():
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    else:
        (even, odd), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        rotated = torch.stack([cos * even - sin * odd, sin * even + cos * odd], dim=-1)
    return rotated.flatten(-2).to(x_BNTD.dtype)
