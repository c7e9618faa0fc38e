"""GGPO: noise on a layer's weight in training, stronger in rows with large weights or large gradients.

Letters: O output features or channels, I input features or channels, R rank, h w kernel, N = I * h * w.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from torch.nn.grad import conv2d_input

from library.options.declared import declare
from networks.core.arguments.values import NUMBER
from networks.core.changes.alpha import ScaledDelta
from networks.core.changes.change import Delta, Forward, get_weight, weight_shape
from networks.core.changes.dora import squared_rows
from networks.core.changes.dropout import NO_DROPOUT, Dropout
from networks.core.changes.parameter_keys import DOWN, UP
from networks.core.changes.tlora import NoiseMask

NUM_SEEDS = 2**62
DEVIATION = "ggpo_deviation"  # in memory and in training states only


@dataclass(frozen=True)
class GgpoArguments:
    """The network arguments of GGPO, which needs both of them."""

    ggpo_sigma: float | None = declare(NUMBER, None, needs="ggpo_beta")
    """Noise on weights in training (GGPO), by the norms of rows, such as 0.03; against overfitting."""
    ggpo_beta: float | None = declare(NUMBER, None, needs="ggpo_sigma")
    """Noise on weights in training, by the norms of the gradients of rows, such as 0.01."""

    label: ClassVar[str] = "ggpo_sigma and ggpo_beta"
    switches: ClassVar[tuple[str, ...]] = ("ggpo_sigma", "ggpo_beta")
    made_for: ClassVar[str] = "its noise is measured by the two factors of a LoRA, and both of them train"
    excludes: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("init", "use_tucker", "split_qkv", "use_scalar", "dora_wd"),
        "the norms that its noise follows are those of two plain factors",
    )

    @property
    def is_on(self) -> bool:
        is_given = self.ggpo_sigma is not None and self.ggpo_beta is not None
        return is_given and bool(self.ggpo_sigma or self.ggpo_beta)


class Perturbed(ScaledDelta):
    """Gradient-guided perturbation as in sd-scripts: in training, the layer of a LoRA computes with W + P.

    The noise P starts after the first gradient. It is normal with the deviation (sigma c + beta g^2) / sqrt(O) in each
    row, and drawn anew for every call. With a LoRA of the scale s, c^2 = w^2 + |BA|^2 for every row, where w is the
    mean norm of the rows of W, and g = s |B dA + dB A| with the gradients of the previous step.
    """

    def __init__(
        self,
        layer: nn.Module,
        delta: Delta,
        alpha: float,
        arguments: GgpoArguments,
        drops: Dropout = NO_DROPOUT,
        has_scalar: bool = False,
        mask: NoiseMask | None = None,
    ) -> None:
        super().__init__(layer, delta, alpha, drops, has_scalar, mask)
        self.sigma, self.beta = arguments.ggpo_sigma or 0.0, arguments.ggpo_beta or 0.0
        self.base_norm = squared_rows(get_weight(layer)).sqrt().mean()  # w
        self.is_perturbed = False
        self.register_buffer(DEVIATION, torch.zeros(len(self.get_parameter(UP))))
        self.register_load_state_dict_post_hook(_go_on_with_noise)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, base: Forward, strength: float) -> Tensor:
        """Return the layer's output with the change, in the shape and dtype of the layer's own output."""
        if self.training and self.drops.skips_this_call():
            return base(x)
        out = base(x)
        if self.is_perturbed and self.training:
            assert self.layer is not None
            out = add_noise(out, x, self.layer, self.get_buffer(DEVIATION))
        return self.add_to(out, x, strength)

    def note_gradients(self) -> None:
        """Set the deviations of the noise from the factors and their gradients."""
        up, down = self.get_parameter(UP), self.get_parameter(DOWN)
        if up.grad is None or down.grad is None:
            return  # no learning rate
        b, a, db, da = (t.detach().flatten(1).float() for t in (up, down, up.grad, down.grad))
        # Row norms from R x R matrices: |b A|^2 = b (A A') b' for a row b of B. No product of the weight's size is
        # built.
        squares_O = self.base_norm.to(b.device) ** 2 + _along(b, a @ a.T, b)
        grads_O = _along(b, da @ da.T, b) + 2 * _along(b, da @ a.T, db) + _along(db, a @ a.T, db)
        # Rounding can make the expanded square of the gradient negative.
        noise_O = self.sigma * squares_O.sqrt() + self.beta * self.scale**2 * grads_O.clamp_min(0)
        self.get_buffer(DEVIATION).copy_(noise_O / sqrt(len(b)))
        self.is_perturbed = True

    def stored_tensors(self) -> Mapping[str, Tensor]:
        # Other programs would not know the deviations. Training states have them, so that a resumed run repeats the
        # noise.
        return {key: tensor for key, tensor in super().stored_tensors().items() if key != DEVIATION}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.load_state_dict({DEVIATION: self.get_buffer(DEVIATION)} | self.completed(tensors))


def _go_on_with_noise(change: nn.Module, _: object) -> None:
    """Resume the noise if non-zero deviations were loaded."""
    assert isinstance(change, Perturbed)
    if not (deviations_O := change.get_buffer(DEVIATION)).is_meta:
        change.is_perturbed = bool(deviations_O.any())


def _along(left_OR: Tensor, middle_RR: Tensor, right_OR: Tensor) -> Tensor:
    """Return l M r for each row."""
    return ((left_OR @ middle_RR) * right_OR).sum(1)


def add_noise(out: Tensor, x: Tensor, layer: nn.Module, deviations_O: Tensor) -> Tensor:
    """Add the effect of the noise on the layer's input to `out`, in its dtype.

    The seed comes from torch's default generator, so a recomputed block repeats it. The noise is drawn again for the
    gradient of x instead of being kept, which would take as much memory as the layer's weight.
    """
    seed = int(torch.randint(NUM_SEEDS, ()))
    noise: Tensor = _Noise.apply(x.to(out.dtype), layer, deviations_O, seed)  # type: ignore[no-untyped-call]
    return out + noise


def draw(layer: nn.Module, deviations_O: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """Draw P from a seed, in the shape of the layer's weight."""
    shape = weight_shape(layer)
    generator = torch.Generator(deviations_O.device).manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=dtype, device=deviations_O.device)
    return noise.mul_(deviations_O.to(dtype).view(-1, *(1,) * (len(shape) - 1)))


class _Noise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module, deviations_O: Tensor, seed: int) -> Tensor:
        ctx.layer, ctx.deviations_O, ctx.seed, ctx.shape = layer, deviations_O, seed, x.shape
        noise = draw(layer, deviations_O, seed, x.dtype)
        # x and the noise have the dtype of the layer's output already.
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
