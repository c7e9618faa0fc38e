"""Frozen layers whose weights are kept in 8 bits and computed with in the precision of the run.

Letters: O output features, I input features.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of that format
SMALLEST = -24  # exponent of a factor: float16 holds no smaller power of two


class Linear(nn.Linear):
    """A Linear layer that keeps its weight as 8-bit `codes` (O, I) and a factor for each row, `scales` (O, 1).

    `weight` is computed from them whenever it is asked for, in the dtype it had. A factor is the power of two that
    brings its row's largest value just below what the format holds: multiplying by it rounds nothing, so each value is
    off by at most 1/16 of itself, or by a 2^-17th of the row's largest. The class is called as the one it replaces,
    because network modules find layers by that name.
    """

    codes: Tensor
    scales: Tensor

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return decoded(self.codes, self.scales, self.scales.dtype)

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        product: Tensor = _Product.apply(input, self.codes, self.scales)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product.dtype)


class _Product(torch.autograd.Function):
    """x @ weight'. The backward pass decodes the weight again: autograd would keep it in the precision of the run."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return linear(x, decoded(codes, scales, x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        codes, scales = ctx.saved_tensors
        return gradient @ decoded(codes, scales, gradient.dtype), None, None


def decoded(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype) * scales.to(dtype)


@torch.no_grad()
def keep_in_fp8(model: nn.Module) -> int:
    """Turn the Linear layers inside the blocks of a frozen model into ones of 8 bits; gives how many there are.

    Blocks are what lies in lists of modules. What stands outside them, such as embedders and the last layer, is small
    and stays as it is, and so do convolutions and norms. Layers change in place, so that others may hold on to them.
    """
    blocks = [child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module]
    layers = {layer for block in blocks for layer in block.modules() if type(layer) is nn.Linear}
    for layer in layers:
        weight = layer.weight
        largest_O1 = weight.float().abs().amax(dim=1, keepdim=True)
        scales_O1 = torch.exp2((largest_O1 / LARGEST).log2().ceil().clamp(min=SMALLEST))
        del layer.weight
        layer.__class__ = Linear
        layer.register_buffer("codes", (weight.float() / scales_O1).to(FP8))
        layer.register_buffer("scales", scales_O1.to(weight.dtype))
    return len(layers)
