"""Joining of tensors that one checkpoint layout stores separately and another stacks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from library.checkpoints.weights import Weights
from library.errors import UserError


def join_tensors(weights: Weights, parts: Mapping[str, tuple[str, ...]], swapped: str | None = None) -> Weights:
    """Join tensors on reading: `parts` maps each new name to the names whose rows are stacked.

    Other tensors are kept; new names without any part in the checkpoint are omitted. New names that begin with
    `swapped` get their halves swapped. Raises UserError naming the missing parts of an incomplete tensor.
    """
    made: dict[str, tuple[str, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for key, names in parts.items():
        missing = [name for name in names if name not in weights.shapes]
        if len(missing) == len(names):
            continue
        if missing:
            raise UserError(f"{weights.origin} is incomplete: {', '.join(missing)} is missing")
        made[key] = names
        shapes[key] = (sum(weights.shapes[name][0] for name in names), *weights.shapes[names[0]][1:])
    taken = {name for names in made.values() for name in names}
    strangers = {name: shape for name, shape in weights.shapes.items() if name not in taken}

    def read(key: str) -> Tensor:
        if key not in made:
            return weights.read(key)
        tensors = [weights.read(name) for name in made[key]]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return swap_halves(tensor) if swapped is not None and key.startswith(swapped) else tensor

    return Weights(weights.origin, {**shapes, **strangers}, read)


def swap_halves(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])
