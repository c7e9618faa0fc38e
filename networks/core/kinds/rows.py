"""LoRA leaves by the rows of their layer: what one program has in one module, another has in several.

Letters: O rows, I columns, R rank.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from networks.core.kinds.change import Leaves
from networks.core.kinds.leaves import DORA_SCALE, DOWN, UP

SPELLED_ELSEWHERE = {DOWN: "lora_A.weight", UP: "lora_B.weight"}  # in the namings that keep no alpha


def num_rows(leaves: Leaves) -> int:
    """O."""
    return leaves[UP].shape[0]


def dtypes_of(leaves: Leaves) -> frozenset[torch.dtype]:
    """The dtype of the down factor; nothing where there is none."""
    return frozenset((leaves[DOWN].dtype,)) if DOWN in leaves else frozenset()


def take_rows(leaves: Leaves, rows: slice) -> dict[str, Tensor]:
    """The LoRA of some of the rows: these rows of up and all of down."""
    return {DOWN: leaves[DOWN].clone(), UP: leaves[UP][rows].clone()}


def swap_halves(leaves: Leaves) -> dict[str, Tensor]:
    """The halves of the rows exchanged, where there are twice as many rows as inputs."""
    if UP not in leaves or DOWN not in leaves or leaves[UP].shape[0] != 2 * leaves[DOWN].shape[1]:
        return dict(leaves)
    num_rows = leaves[UP].shape[0]
    by_row = [leaf for leaf in (UP, DORA_SCALE) if leaf in leaves and leaves[leaf].shape[0] == num_rows]
    return {**leaves, **{leaf: leaves[leaf].roll(num_rows // 2, 0) for leaf in by_row}}


def join_rows(pieces: Mapping[int, Leaves], rows: Sequence[slice]) -> dict[str, Tensor]:
    """One LoRA for all pieces: exact at the same rank where they share down, else at the sum of their ranks.

    `rows` has where each piece lies; the rows of those that are missing are zero.
    """
    downs = [leaves[DOWN] for leaves in pieces.values()]
    ups = [leaves[UP] for leaves in pieces.values()]
    is_shared = all(torch.equal(down, downs[0]) for down in downs)
    down = downs[0] if is_shared else torch.cat(downs)
    dtype = torch.float32 if any(up.dtype == torch.float32 for up in ups) else down.dtype
    up = torch.zeros(rows[-1].stop, down.shape[0], dtype=dtype)
    for n, i in enumerate(pieces):
        first = 0 if is_shared else sum(down.shape[0] for down in downs[:n])
        up[rows[i], first : first + ups[n].shape[1]] = ups[n].to(dtype)
    return {DOWN: down.to(dtype), UP: up}


def peft_magnitudes(magnitudes: Tensor, num_dimensions: int) -> Tensor:
    """PEFT's magnitudes, one number per output, along the first axis of a weight; it has them as (O,) or (1, O, 1, 1).

    Where a convolution has as many outputs as inputs, the latter is what others have for one number per input.
    """
    return magnitudes.reshape(-1, *(1,) * (num_dimensions - 1))
