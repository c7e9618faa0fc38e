"""The factors of a block's adapters, cast for autocast by one kernel instead of one for each factor and each gradient.

A large U-Net has 722 adapted layers with two factors each. Cast one by one they were a fifth of the kernels of a step,
which a GPU takes longer to launch than to run. Down factors of layers with one input, such as to_q, to_k and to_v of
self-attention, are cast into one matrix: one product takes the place of one for each layer, forward and backward.

Letters: R rank of one factor, I inputs, J rows of a joined matrix, its factors' ranks together.
"""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear


class Factors(NamedTuple):
    """The modules of a block whose `weight` is cast."""

    alone: Sequence[nn.Module]
    joined: Sequence[Sequence[nn.Module]]  # down factors (R, I) of layers that get one input

    @property
    def all(self) -> list[nn.Module]:
        return [*chain.from_iterable(self.joined), *self.alone]


FACTORS: MutableMapping[nn.Module, Factors] = WeakKeyDictionary()
"""By block, the factors that are cast in it."""


class JoinedProduct:
    """The products of one input with the rows of a joined matrix (J, I), computed when the first of them is needed."""

    def __init__(self, weight_JI: Tensor, ranks: Sequence[int]) -> None:
        self.weight_JI, self.ranks = weight_JI, ranks
        self._input: Tensor | None = None
        self._products: Mapping[int, Tensor] = {}

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """Return the product (..., R) of x (..., I) and the factor at `index`."""
        if x is not self._input:  # a cross-attention's keys have another input than its queries
            rows_JI, ranks = self.weight_JI[sum(self.ranks[:index]) :], list(self.ranks[index:])
            products = linear(x, rows_JI).split_with_sizes(ranks, -1)
            self._input, self._products = x, dict(enumerate(products, index))
        return self._products[index]


def cast_in_blocks(
    blocks: Iterable[nn.Module],
    factors: Mapping[nn.Module, Sequence[nn.Module]],
    joined: Iterable[Sequence[nn.Module]] = (),
) -> None:
    """From now on, cast the factors of each block together; `factors` has those of each layer.

    They must be modules whose weight is only multiplied or convolved with, which autocast does in its dtype. `joined`
    has sequences of those whose layers may get one input, in the order in which they do; while a block runs, each has
    an attribute `product`, a function from its input to the product with its weight.
    """
    of_first = {modules[0]: modules for modules in joined}
    for block in blocks:
        inside = [factor for layer in block.modules() for factor in factors.get(layer, ())]
        groups = [of_first[factor] for factor in inside if factor in of_first]
        in_groups = set(chain.from_iterable(groups))
        if inside:
            FACTORS[block] = Factors([factor for factor in inside if factor not in in_groups], groups)


@contextmanager
def cast_factors(block: nn.Module) -> Iterator[None]:
    """Give float32 factors of a block their autocast dtype, with gradient, while it runs with autocast."""
    factors = FACTORS.get(block)
    weights: list[Any] = [module.weight for module in factors.all] if factors else []
    device = weights[0].device.type if weights else "cpu"
    is_cast = torch.is_autocast_enabled(device) and all(weight.dtype == torch.float32 for weight in weights)
    if factors is None or not is_cast or torch.compiler.is_compiling():
        yield
        return
    with given_as(factors, torch.get_autocast_dtype(device)):
        yield


@contextmanager
def given_as(factors: Factors, dtype: torch.dtype) -> Iterator[None]:
    """Give factors a dtype, with gradient, and join what is joined."""
    modules = factors.all
    weights: list[Any] = [module.weight for module in modules]
    sizes = [len(group) for group in factors.joined]
    casts: Sequence[Tensor] = CastTogether.apply(dtype, sizes, *weights)  # type: ignore[no-untyped-call]
    try:
        for group, cast in zip(factors.joined, casts, strict=False):
            ranks = [len(module.weight) for module in group]  # type: ignore[arg-type]
            product = JoinedProduct(cast, ranks)
            for index, (module, rows) in enumerate(zip(group, cast.split_with_sizes(ranks), strict=True)):
                module._parameters["weight"] = rows  # type: ignore[assignment]
                module.__dict__["product"] = partial(product, index)
        for module, cast in zip(factors.alone, casts[len(sizes) :], strict=True):
            module._parameters["weight"] = cast  # type: ignore[assignment]
        yield
    finally:
        for module, weight in zip(modules, weights, strict=True):
            module._parameters["weight"] = weight
            module.__dict__.pop("product", None)


class CastTogether(torch.autograd.Function):
    """Casts tensors of one dtype to another, and their gradients back.

    The first tensors are joined by their rows: `sizes` has the numbers of tensors in each joined one.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, sizes: Sequence[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype
        rest = iter(tensors)
        groups, alone = [list(islice(rest, size)) for size in sizes], list(rest)
        ctx.rows = [[len(tensor) for tensor in group] for group in groups]
        joined = [
            group[0].new_empty(sum(rows), *group[0].shape[1:], dtype=dtype)
            for group, rows in zip(groups, ctx.rows, strict=True)
        ]
        copies = [torch.empty_like(tensor, dtype=dtype) for tensor in alone]
        parts = chain.from_iterable(one.split_with_sizes(rows) for one, rows in zip(joined, ctx.rows, strict=True))
        copy_all([*parts, *copies], tensors)
        return *joined, *copies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        parts: list[Tensor | None] = []
        for rows, gradient in zip(ctx.rows, gradients, strict=False):
            parts += [None] * len(rows) if gradient is None else gradient.split_with_sizes(rows)
        parts += gradients[len(ctx.rows) :]
        given = [part for part in parts if part is not None]
        copies = [torch.empty_like(part, dtype=ctx.dtype) for part in given]
        copy_all(copies, given)
        copied = iter(copies)
        return None, None, *(None if part is None else next(copied) for part in parts)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(list(targets), list(sources))
