"""The factors of a block's adapters, cast for autocast by one kernel instead of one for each factor and each gradient.

A large U-Net has 722 adapted layers with two factors each. Cast one by one they were a fifth of the kernels of a step,
which a GPU takes longer to launch than to run.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FACTORS: MutableMapping[nn.Module, Sequence[nn.Module]] = WeakKeyDictionary()
"""By block, the modules whose `weight` is cast."""


def cast_in_blocks(blocks: Iterable[nn.Module], factors: Mapping[nn.Module, Sequence[nn.Module]]) -> None:
    """From now on, cast the factors of each block together; `factors` has those of each layer.

    They must be modules whose weight is only multiplied or convolved with, which autocast does in its dtype.
    """
    for block in blocks:
        FACTORS[block] = [factor for layer in block.modules() for factor in factors.get(layer, ())]


@contextmanager
def cast_factors(block: nn.Module) -> Iterator[None]:
    """Give float32 factors of a block their autocast dtype, with gradient, while it runs with autocast."""
    modules = FACTORS.get(block, ())
    weights: list[Any] = [module.weight for module in modules]
    device = weights[0].device.type if weights else "cpu"
    is_cast = torch.is_autocast_enabled(device) and all(weight.dtype == torch.float32 for weight in weights)
    if not weights or not is_cast or torch.compiler.is_compiling():
        yield
        return
    casts = CastTogether.apply(torch.get_autocast_dtype(device), *weights)  # type: ignore[no-untyped-call]
    try:
        for module, cast in zip(modules, casts, strict=True):
            module._parameters["weight"] = cast
        yield
    finally:
        for module, weight in zip(modules, weights, strict=True):
            module._parameters["weight"] = weight


class CastTogether(torch.autograd.Function):
    """Casts tensors of one dtype to another, and their gradients back."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        return tuple(cast(tensors, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        given = iter(cast([gradient for gradient in gradients if gradient is not None], ctx.dtype))
        return None, *(None if gradient is None else next(given) for gradient in gradients)


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies
