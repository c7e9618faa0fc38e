"""GGPO: noise on the weights of a layer while it trains, stronger in rows that are large or still learn.

Letters: O output features or channels, I input features or channels, R rank, h w kernel, N = I * h * w.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from torch.nn.grad import conv2d_input

from networks.core.changes.dora import squared_rows

NUM_SEEDS = 2**62


@dataclass(frozen=True)
class Perturbation:
    """Gradient-guided perturbation, as sd-scripts has it: in training a layer computes with W + P beside its
    LoRA, P normal with the deviation (sigma c + beta g^2) / sqrt(O) in each row, drawn anew for every call.

    With a LoRA of the scale s, c^2 = w^2 + |BA|^2 for every row, w the mean norm of the rows of W, and
    g = s |B dA + dB A| of the gradients of the step before. Norms of rows come from the factors, no product is built.
    """

    sigma: float
    beta: float
    base_norm: Tensor  # w

    @classmethod
    def of(cls, sigma: float, beta: float, weight: Tensor) -> "Perturbation":
        """For a layer with this weight."""
        return cls(sigma, beta, squared_rows(weight).sqrt().mean())

    @torch.no_grad()
    def deviations(self, up_OR: Tensor, down_RN: Tensor, up_grad_OR: Tensor, down_grad_RN: Tensor, s: float) -> Tensor:
        """Of each row of P, float32, from the factors of a LoRA and their gradients."""
        b, a, db, da = (t.float() for t in (up_OR, down_RN, up_grad_OR, down_grad_RN))
        squares_O = self.base_norm.to(b.device) ** 2 + _along(b, a @ a.T, b)
        grads_O = _along(b, da @ da.T, b) + 2 * _along(b, da @ a.T, db) + _along(db, a @ a.T, db)
        return (self.sigma * squares_O.sqrt() + self.beta * s**2 * grads_O.clamp_min(0)) / sqrt(len(b))


def _along(left_OR: Tensor, middle_RR: Tensor, right_OR: Tensor) -> Tensor:
    """Of each row l M r."""
    return ((left_OR @ middle_RR) * right_OR).sum(1)


def add_noise(out: Tensor, x: Tensor, layer: nn.Module, deviations_O: Tensor) -> Tensor:
    """`out` plus what the noise makes of the layer's input, in the dtype of `out`.

    A seed comes from torch's default generator, so that a recomputed block repeats it; the noise itself is drawn once
    more for the gradient of x instead of being kept, which would take as much as the layer's weight.
    """
    seed = int(torch.randint(NUM_SEEDS, ()))
    noise: Tensor = _Noise.apply(x.to(out.dtype), layer, deviations_O, seed)  # type: ignore[no-untyped-call]
    return out + noise


def draw(layer: nn.Module, deviations_O: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """P, in the shape of the layer's weight."""
    shape = _shape_of(layer)
    generator = torch.Generator(deviations_O.device).manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=dtype, device=deviations_O.device)
    return noise.mul_(deviations_O.to(dtype).view(-1, *(1,) * (len(shape) - 1)))


def _shape_of(layer: nn.Module) -> Sequence[int]:
    """Of the weight, which a layer in another form would decode for it."""
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, layer.in_channels, *layer.kernel_size)
    assert isinstance(layer, nn.Linear)
    return (layer.out_features, layer.in_features)


class _Noise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module, deviations_O: Tensor, seed: int) -> Tensor:
        ctx.layer, ctx.deviations_O, ctx.seed, ctx.shape = layer, deviations_O, seed, x.shape
        noise = draw(layer, deviations_O, seed, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if not isinstance(layer, nn.Conv2d):
                return linear(x, noise)
            return conv2d(x, noise, None, layer.stride, layer.padding, layer.dilation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:  # type: ignore[override]
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        layer, noise = ctx.layer, draw(ctx.layer, ctx.deviations_O, ctx.seed, grad.dtype)
        with torch.autocast(grad.device.type, enabled=False):
            if not isinstance(layer, nn.Conv2d):
                return grad @ noise, None, None, None
            geometry = layer.stride, layer.padding, layer.dilation, layer.groups
            return conv2d_input(ctx.shape, noise, grad, *geometry), None, None, None  # type: ignore[no-untyped-call]
