"""Joining and splitting of tensors that one checkpoint layout stores separately and another stacks."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from library.base.errors import of_file
from library.checkpoints.weights import Quantised, Weights, select_weights


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
            raise of_file(weights.origin, cause="missing")(f"is incomplete: {', '.join(missing)} is missing")
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


def split_rows(weights: Weights, fused: str, parts: Sequence[str]) -> Weights:
    """Split the layers called `fused` into `parts`, equal shares of their rows, when they are read.

    Names are ends of paths ("attn.qkv"). 8-bit codes stay as stored.
    """
    sources = {
        key.replace(f".{fused}.", f".{part}."): (key, number)
        for key in weights.shapes
        if f".{fused}." in key
        for number, part in enumerate(parts)
    }
    if not sources:
        return weights
    whole = {key for key, _ in sources.values()}
    count = len(parts)
    shapes = {key: shape for key, shape in weights.shapes.items() if key not in whole}
    for new_key, (key, _) in sources.items():
        num_rows, *columns = weights.shapes[key]
        shapes[new_key] = (num_rows // count, *columns)

    def read(name: str) -> Tensor:
        if name not in sources:
            return weights.read(name)
        key, number = sources[name]
        return take_rows(weights.read(key), number, count)

    quantised = {name: codes for name, codes in weights.quantised.items() if name not in whole} | {
        new_key: take_quantised_rows(weights.quantised[key], number, count)
        for new_key, (key, number) in sources.items()
        if key in weights.quantised
    }
    return replace(weights, shapes=shapes, read=read, quantised=quantised)


def take_quantised_rows(quantised: Quantised, number: int, count: int) -> Quantised:
    """Return one of `count` shares of the rows of a quantised weight; a scale of the whole tensor applies to each."""

    def read() -> Mapping[str, Tensor] | None:
        parts = quantised.read()
        return parts if parts is None else {name: take_rows(part, number, count) for name, part in parts.items()}

    return replace(quantised, read=read)


def take_rows(part: Tensor, number: int, count: int) -> Tensor:
    # A copy, because a view would keep the other rows in memory.
    return part if part.ndim == 0 else torch.chunk(part, count)[number].clone()
