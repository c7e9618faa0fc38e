"""Low-rank deltas: two small factors with dW = up @ down, and functions that run layers with such factors.

Letters: O output features or channels, I input features or channels, R rank, h w kernel, N = I * h * w.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from networks.core.changes.change import check_kernel, get_weight, match_dtype
from networks.core.changes.parameter_keys import UP


class TwoFactors(nn.Module):
    """Base class of deltas with two factors, which can be parameters or computed from them."""

    has_core = False
    is_whole = False
    fast_key = UP
    lora_down: nn.Module
    lora_up: nn.Module

    def down_factor(self) -> Tensor:
        """Return down for the next call, (R, I) or (R, I, h, w)."""
        return get_weight(self.lora_down)

    def up_factor(self) -> Tensor:
        """Return up for the next call, (O, R) or (O, R, 1, 1)."""
        return get_weight(self.lora_up)

    def draw(self, *downs: nn.Module) -> None:
        """Draw down factors kaiming uniform with a = sqrt(5); up is zero, so that the change starts at zero."""
        for module in downs:
            nn.init.kaiming_uniform_(get_weight(module), a=math.sqrt(5))
        nn.init.zeros_(get_weight(self.lora_up))

    def start_moving(self) -> None:
        nn.init.kaiming_uniform_(get_weight(self.lora_up), a=math.sqrt(5))

    def down(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        return run_like(self.lora_down, x, self.down_factor(), columns)

    def up(self, hidden: Tensor, base: Tensor) -> Tensor:
        return add_product(base, hidden, self.up_factor())

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.up_factor().flatten(1), self.down_factor().flatten(1)

    def weight(self) -> Tensor:
        up_OR, down_RN = self.factors()
        return (up_OR @ down_RN).reshape(up_OR.shape[0], *get_weight(self.lora_down).shape[1:])


class LowRank(TwoFactors):
    """LoRA (Hu et al. 2021, arXiv:2106.09685): dW = up @ down.

    `lora_down.weight` is (R, I) or (R, I, h, w) and starts kaiming uniform with a = sqrt(5); `lora_up.weight` is (O, R)
    or (O, R, 1, 1) and starts at zero, so the change starts at zero. Both are float32.
    """

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        self.rank = rank
        if isinstance(layer, nn.Linear):
            self.lora_down = nn.Linear(layer.in_features, rank, bias=False, dtype=torch.float32)
            self.lora_up = nn.Linear(rank, layer.out_features, bias=False, dtype=torch.float32)
        else:
            assert isinstance(layer, nn.Conv2d)
            self.lora_down = narrow_like(layer, rank)
            self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, bias=False, dtype=torch.float32)
        self.draw(self.lora_down)

    def down(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        product: Callable[[Tensor], Tensor] | None = self.lora_down.__dict__.get("product")
        return super().down(x, columns) if product is None or columns is not None else product(x)

    def modules_of_factors(self) -> tuple[nn.Module, nn.Module]:
        """Return the modules that hold down and up, which only multiply and convolve with them."""
        return self.lora_down, self.lora_up


def run_like(layer: nn.Module, x: Tensor, weight: Tensor, columns: Tensor | None = None) -> Tensor:
    """Run x through `weight` in place of the layer's own weight.

    `columns` (1, I) or (1, I, 1, 1) scales the input channels. It is applied to the weight, so that autograd keeps x
    itself, which other operations keep too.
    """
    if columns is not None:
        weight = weight * columns.to(weight.dtype)
    x = match_dtype(weight, x)
    if not isinstance(layer, nn.Conv2d):
        return linear(x, weight)
    pixels_BHWI = pixels_in_rows(x)
    # torch's convolution copies a channels-last input first. A 1x1 convolution of it is a matrix product, which does
    # not.
    if pixels_BHWI is not None and looks_at_one_pixel(layer):
        return linear(pixels_BHWI, weight.flatten(1)).permute(0, 3, 1, 2)
    return conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation)


def narrow_like(layer: nn.Conv2d, rank: int, in_channels: int | None = None) -> nn.Conv2d:
    """Make a convolution with the kernel, stride, padding and dilation of `layer` and R output channels.

    `in_channels` defaults to that of the layer. Raises UserError for a convolution that cannot be adapted.
    """
    check_kernel(layer)
    return nn.Conv2d(
        layer.in_channels if in_channels is None else in_channels,
        rank,
        kernel_size=layer.kernel_size,  # type: ignore[arg-type]
        stride=layer.stride,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
        dilation=layer.dilation,  # type: ignore[arg-type]
        bias=False,
        dtype=torch.float32,
    )


def add_product(base: Tensor, hidden: Tensor, up: Tensor) -> Tensor:
    """Add the product of `hidden` (R channels) and `up`, (O, R) or (O, R, 1, 1), to `base`, in the dtype of `base`."""
    if up.dim() == 4:
        pixels_BHWO, hidden_BHWR = pixels_in_rows(base), pixels_in_rows(hidden)
        if pixels_BHWO is None or hidden_BHWR is None:
            return base + conv2d(hidden, up).to(base.dtype)
        return add_product(pixels_BHWO, hidden_BHWR, up.flatten(1)).permute(0, 3, 1, 2)
    if base.dim() > 1 and hidden.dtype == base.dtype and base.is_contiguous():
        # One pass over the outputs instead of two: addmm adds the product directly.
        return torch.addmm(base.flatten(0, -2), hidden.flatten(0, -2), up.t()).view_as(base)
    return base + linear(hidden, up).to(base.dtype)


def pixels_in_rows(x: Tensor) -> Tensor | None:
    """View images (B, C, H, W) as (B, H, W, C), or return None if they are not channels-last in memory."""
    pixels_BHWC = x.permute(0, 2, 3, 1)
    return pixels_BHWC if pixels_BHWC.is_contiguous() else None


def looks_at_one_pixel(layer: nn.Conv2d) -> bool:
    """Return True if a convolution multiplies every pixel by the same matrix."""
    return layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0)
