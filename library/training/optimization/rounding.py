"""Stochastic rounding of bf16 weights: small steps count on average instead of never.

bf16 has 8 bits of precision: an update below 1/512 of a weight is lost when it is rounded to the nearest, in every step
anew. Rounded up or down at random, by how near each lies, it is there on average (Zamirai et al. 2020,
arXiv:2010.06192).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

LOST_BITS = 16  # of a float32 that bf16 has not


@contextmanager
def stochastic_rounding(parameters: Sequence[Tensor], generator: torch.Generator) -> Iterator[None]:
    """Inside, bf16 weights and their gradients are float32, for an optimizer to move; then they are rounded.

    So any optimizer computes as it would for float32 weights, its memory included. Gradients are gone afterwards.
    `generator` is on the device of the weights and draws for them in their order.
    """
    with in_float32(parameters, partial(round_to_bf16, generator=generator)):
        yield


@contextmanager
def in_float32(parameters: Sequence[Tensor], to_bf16: Callable[[Tensor], Tensor] = Tensor.bfloat16) -> Iterator[None]:
    """Inside, bf16 weights and their gradients are float32; afterwards `to_bf16` rounds, and gradients are gone."""
    rounded = [parameter for parameter in parameters if parameter.dtype == torch.bfloat16]
    for parameter in rounded:
        gradient, parameter.grad = parameter.grad, None
        parameter.data = parameter.data.float()
        parameter.grad = None if gradient is None else gradient.float()
    try:
        yield
    finally:
        for parameter in rounded:
            parameter.grad = None
            parameter.data = to_bf16(parameter.data)


def round_to_bf16(values: Tensor, generator: torch.Generator) -> Tensor:
    """One of the two neighbours in bf16 of each float32 value, each as likely as the value is near to it."""
    noise = torch.randint(1 << LOST_BITS, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = (values.contiguous().view(torch.int32) + noise) >> LOST_BITS << LOST_BITS
    return torch.where(values.isfinite(), bits.view(torch.float32), values).bfloat16()
