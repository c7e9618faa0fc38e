"""Exchange of the weights of two models with the same storage."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from library.base.errors import UserError
from library.memory.devices import tensors_of


@contextmanager
def exchange_weights(model: nn.Module, other: nn.Module) -> Iterator[None]:
    """Exchange the weights of two models inside the block, and restore them afterwards, bit for bit."""
    exchange(model, other)
    try:
        yield
    finally:
        exchange(model, other)


@torch.no_grad()
def exchange(model: nn.Module, other: nn.Module) -> None:
    """Exchange the weights of two models, one tensor at a time, so that no device holds more than before.

    Tensors keep their memory, which compiled code may refer to. If a copy fails, earlier exchanges are undone. Raises
    UserError, before any exchange, if the models are stored differently.
    """
    ours, theirs = tensors_of(model), tensors_of(other)
    if [(t.shape, t.dtype) for t in ours] != [(t.shape, t.dtype) for t in theirs]:
        raise UserError("the weights are stored differently from those of the model that is trained")
    swapped: list[tuple[Tensor, Tensor]] = []
    try:
        for pair in zip(ours, theirs, strict=True):
            swap(*pair)
            swapped.append(pair)
    # Ctrl+C must not leave a mixture of the two models either.
    except BaseException:
        for pair in swapped:
            swap(*pair)
        raise


def swap(first: Tensor, second: Tensor) -> None:
    """Exchange the values of two tensors in place."""
    saved = first.to(second.device, copy=True)
    first.copy_(second)
    second.copy_(saved)
