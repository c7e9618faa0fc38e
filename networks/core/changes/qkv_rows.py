"""Splitting and joining of LoRA tensors by rows, for programs that divide a layer into modules differently.

Letters: O rows, I columns, R rank.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from networks.core.changes.change import ModuleTensors
from networks.core.changes.parameter_keys import DORA_SCALE, DOWN, UP

SPELLED_ELSEWHERE = {DOWN: "lora_A.weight", UP: "lora_B.weight"}  # in the namings without alpha
PEFT_MAGNITUDES = "lora_magnitude_vector"
PEFT_MAGNITUDES_IN_MEMORY = f"{PEFT_MAGNITUDES}.weight"  # PEFT reads both, transformers' text encoders only this one


def num_rows(tensors: ModuleTensors) -> int:
    """Return O."""
    return tensors[UP].shape[0]


def dtypes_of(tensors: ModuleTensors) -> frozenset[torch.dtype]:
    """Return the dtype of the down factor, or an empty set if there is none."""
    return frozenset((tensors[DOWN].dtype,)) if DOWN in tensors else frozenset()


def take_rows(tensors: ModuleTensors, rows: slice) -> dict[str, Tensor]:
    """Return the LoRA of some rows: these rows of up and of magnitudes per output, and all of down."""
    # Cloned, because safetensors refuses tensors that share memory, and all parts have the same down factor.
    magnitudes = {DORA_SCALE: tensors[DORA_SCALE][rows].clone()} if DORA_SCALE in tensors else {}
    return {DOWN: tensors[DOWN].clone(), UP: tensors[UP][rows].clone(), **magnitudes}


BY_ROW = (UP, "hada_w1_a", "hada_w2_a")  # tensors whose rows are those of the layer
OUTER, INNER = ("lokr_w1", "lokr_w1_a"), ("lokr_w2", "lokr_w2_a")  # layer row l K + k: row l of OUTER, k of INNER


def swap_halves(tensors: ModuleTensors) -> dict[str, Tensor] | None:
    """Return the tensors with the two halves of the layer's rows exchanged, or None if that is impossible."""
    by_row: tuple[str, ...] = BY_ROW
    if outer := [tensors[key] for key in OUTER if key in tensors]:
        # Rows of a Kronecker product are grouped by the rows of its first matrix; if that has one row, they are those
        # of the second.
        by_row = INNER if len(outer[0]) == 1 else OUTER
    keys = [key for key in by_row if key in tensors]
    if not keys or any(len(tensors[key]) % 2 for key in keys):
        return None
    if DORA_SCALE in tensors and len(tensors[DORA_SCALE]) > 1:
        keys.append(DORA_SCALE)
    return {**tensors, **{key: tensors[key].roll(len(tensors[key]) // 2, 0) for key in keys}}


def join_rows(pieces: Mapping[int, ModuleTensors], rows: Sequence[slice]) -> dict[str, Tensor]:
    """Join the LoRAs of parts into one: exact at the same rank if they share down, else at the sum of their ranks.

    `rows` holds the rows of every part; rows of missing parts are zero. Magnitudes per output, which all parts or none
    have, are concatenated, since the norm of a row is the same in the whole layer.
    """
    downs = [tensors[DOWN] for tensors in pieces.values()]
    ups = [tensors[UP] for tensors in pieces.values()]
    # A LoRA of the whole layer that was split has the same down factor in each part, and joining restores its rank.
    is_shared = all(torch.equal(down, downs[0]) for down in downs)
    down = downs[0] if is_shared else torch.cat(downs)
    # An up factor is float32 where a scale was multiplied into it that 16 bits cannot hold. PEFT multiplies factors of
    # one dtype, so down becomes float32 too.
    dtype = torch.float32 if any(up.dtype == torch.float32 for up in ups) else down.dtype
    up = torch.zeros(rows[-1].stop, down.shape[0], dtype=dtype)
    for n, i in enumerate(pieces):
        first = 0 if is_shared else sum(down.shape[0] for down in downs[:n])
        up[rows[i], first : first + ups[n].shape[1]] = ups[n].to(dtype)
    magnitudes = [pieces[i][DORA_SCALE] for i in sorted(pieces) if DORA_SCALE in pieces[i]]
    return {DOWN: down.to(dtype), UP: up, **({DORA_SCALE: torch.cat(magnitudes)} if magnitudes else {})}


def peft_magnitudes(magnitudes: Tensor, num_dimensions: int) -> Tensor:
    """Return PEFT's magnitudes, one per output, in the shape (O, 1, ...) of a weight with `num_dimensions` dimensions.

    PEFT stores them as (O,) or (1, O, 1, 1). If a convolution has as many outputs as inputs, the latter is the shape
    that other programs use for one number per input.
    """
    return magnitudes.reshape(-1, *(1,) * (num_dimensions - 1))


def to_peft_magnitudes(magnitudes: Tensor) -> Tensor:
    """Undo `peft_magnitudes`, for (O, 1) or (O, 1, 1, 1)."""
    return magnitudes.flatten() if magnitudes.dim() == 2 else magnitudes.transpose(0, 1).contiguous()
