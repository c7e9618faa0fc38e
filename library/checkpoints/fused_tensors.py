"""Joining of tensors that one checkpoint layout stores separately and another stacks."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from library.checkpoints.weights import Weights, select_weights
from library.errors import UserError


def join_tensors(weights: Weights, parts: Mapping[str, tuple[str, ...]], swapped: str | None = None) -> Weights:
    """Join tensors on reading: `parts` maps each new name to the names whose rows are stacked.

    Other tensors are kept; new names without any part in the checkpoint are omitted. New names that begin with
    `swapped` get their halves swapped. Tensors that are only renamed keep the form in which the file stores them.
    Raises UserError naming the missing parts of an incomplete tensor.
    """
    swaps = {key for key in parts if swapped is not None and key.startswith(swapped)}
    shapes: dict[str, tuple[int, ...]] = {}
    stacked: dict[str, tuple[str, ...]] = {}
    renamed: dict[str, str] = {}
    for key, names in parts.items():
        missing = [name for name in names if name not in weights.shapes]
        if len(missing) == len(names):
            continue
        if missing:
            raise UserError(f"{weights.origin} is incomplete: {', '.join(missing)} is missing")
        shapes[key] = (sum(weights.shapes[name][0] for name in names), *weights.shapes[names[0]][1:])
        if len(names) == 1 and key not in swaps:
            renamed[key] = names[0]
        else:
            stacked[key] = names
    joined = {*renamed.values(), *(name for names in stacked.values() for name in names)}
    others = {name: name for name in weights.shapes if name not in joined}
    unstacked = select_weights(weights, {**renamed, **others})

    def read(key: str) -> Tensor:
        if key not in stacked:
            return unstacked.read(key)
        tensor = torch.cat([weights.read(name) for name in stacked[key]])
        return swap_halves(tensor) if key in swaps else tensor

    return replace(unstacked, shapes={**shapes, **unstacked.shapes}, read=read)


def swap_halves(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])
