"""Joining of tensors that one checkpoint layout stores separately and another stacks."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from library.checkpoints.weights import Weights
from library.errors import UserError


def join_tensors(weights: Weights, parts: Mapping[str, tuple[str, ...]], swapped: str | None = None) -> Weights:
    """Join tensors on reading: `parts` maps each new name to the names whose rows are stacked.

    Other tensors are kept; new names without any part in the checkpoint are omitted. New names that begin with
    `swapped` get their halves swapped. Tensors that are only renamed keep the form in which the file stores them.
    Raises UserError naming the missing parts of an incomplete tensor.
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
    others = {name: shape for name, shape in weights.shapes.items() if name not in taken}

    def is_swapped(key: str) -> bool:
        return swapped is not None and key.startswith(swapped)

    def read(key: str) -> Tensor:
        if key not in made:
            return weights.read(key)
        tensors = [weights.read(name) for name in made[key]]
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        return swap_halves(tensor) if is_swapped(key) else tensor

    renamed = {key: names[0] for key, names in made.items() if len(names) == 1 and not is_swapped(key)}
    renamed |= {name: name for name in others}
    return replace(
        weights,
        shapes={**shapes, **others},
        read=read,
        quantised={new: weights.quantised[old] for new, old in renamed.items() if old in weights.quantised},
        padded_to={new: weights.padded_to[old] for new, old in renamed.items() if old in weights.padded_to},
    )


def swap_halves(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])
