"""Stochastic rounding of bf16 weights, so that small updates count on average.

bf16 has 8 bits of precision: an update below 1/512 of a weight is lost by rounding to nearest, in every step. Rounding
up or down at random, with probabilities by distance, preserves it on average (Zamirai et al. 2020, arXiv:2010.06192).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

LOST_BITS = 16  # bits of a float32 that bf16 lacks


@contextmanager
def stochastic_rounding(parameters: Sequence[Tensor], generator: torch.Generator) -> Iterator[None]:
    """Make bf16 weights and their gradients float32 for an optimizer step inside the block, then round the weights
    stochastically.

    Any optimizer then computes as for float32 weights, including its state. Gradients are cleared afterwards.
    `generator` is on the weights' device and draws for them in order.
    """
    with step_in_float32(parameters, partial(round_to_bf16, generator=generator)):
        yield


@contextmanager
def step_in_float32(
    parameters: Sequence[Tensor], to_bf16: Callable[[Tensor], Tensor] = Tensor.bfloat16
) -> Iterator[None]:
    """Make bf16 weights and their gradients float32 inside the block; afterwards `to_bf16` rounds the weights, and
    gradients are cleared."""
    bf16_parameters = [parameter for parameter in parameters if parameter.dtype == torch.bfloat16]
    for parameter in bf16_parameters:
        # torch accepts a gradient only in its parameter's dtype.
        gradient, parameter.grad = parameter.grad, None
        parameter.data = parameter.data.float()
        parameter.grad = None if gradient is None else gradient.float()
    try:
        yield
    finally:
        for parameter in bf16_parameters:
            parameter.grad = None
            parameter.data = to_bf16(parameter.data)


def round_to_bf16(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round each float32 value to one of its two neighbours in bf16, with probabilities by distance."""
    noise = torch.randint(1 << LOST_BITS, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = (values.contiguous().view(torch.int32) + noise) >> LOST_BITS << LOST_BITS
    # Noise added to the bits of a NaN may carry into the sign and give a finite number.
    return torch.where(values.isfinite(), bits.view(torch.float32), values).bfloat16()
