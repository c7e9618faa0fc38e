"""Checkpoints in which several tensors, one below the other, are what another layout has as one."""

from collections.abc import Mapping

import torch
from torch import Tensor

from library.checkpoints.weights import Weights
from library.errors import UserError


def joined(weights: Weights, parts: Mapping[str, tuple[str, ...]], swapped: str | None = None) -> Weights:
    """The tensors that `parts` lists under their new names, each joined from its old ones when it is read.

    New names of which the checkpoint has no part are left out; old names that belong to none stay as they are. Where
    the new name begins with `swapped`, the halves change places. Raises UserError naming what is missing of a tensor
    whose other parts are there.
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
