"""Convolutions of few pixels as one matrix product, which is up to five times faster on a CPU.

oneDNN reorders the weight of a convolution in every call. With large weights and small images, as in the lower half of
a U-Net, this takes longer than the product itself: three times as long at 8 x 8 pixels and 1280 channels. Here the
input patches are unfolded instead, and the weight is used as it is.

Letters: O output channels, I input channels, H W pixels, h w kernel, N = h * w * I.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, pad


def is_better(outputs: torch.Size, weight: Tensor, layer: nn.Conv2d) -> bool:
    """Return True if the product is faster for outputs (B, O, H, W) on a CPU.

    This is true for fewer pixels in the batch than output channels, and for 1x1 kernels, where nothing is unfolded.
    """
    return (
        weight.device.type == "cpu"
        # For larger images oneDNN is faster: 47 ms instead of 79 for 320 channels at 64 x 64. The input of a 1x1 kernel
        # already is the matrix, but torch copies it first: 0.09 of 4.6 s per step of a U-Net at 256 px.
        and (outputs[0] * outputs[2] * outputs[3] < outputs[1] or layer.kernel_size == (1, 1))
        # In any other layout `view_as_matrix` would copy the weight in each call.
        and weight.is_contiguous(memory_format=torch.channels_last)
        and layer.groups == 1
        and layer.dilation == (1, 1)
        and not torch.compiler.is_compiling()
    )


def shape_of_output(x: torch.Size, layer: nn.Conv2d) -> torch.Size:
    """Return the output's shape (B, O, H, W) for an input (B, I, H, W), without dilation."""
    height, width = (
        (size + 2 * padding - kernel) // stride + 1
        for size, padding, kernel, stride in zip(
            x[2:], zero_borders(layer), layer.kernel_size, layer.stride, strict=True
        )
    )
    return torch.Size((x[0], layer.out_channels, height, width))


def output(x: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Conv2d) -> Tensor:
    """Convolve `x` (B, I, H, W) with a channels-last weight (O, I, h, w); the result is channels last too."""
    (top, left), (row_stride, column_stride) = zero_borders(layer), layer.stride
    x_BHWI = pad(x.permute(0, 2, 3, 1), (0, 0, left, left, top, top))
    patches_BHWIhw = x_BHWI.unfold(1, weight.shape[2], row_stride).unfold(2, weight.shape[3], column_stride)
    columns_BHWN = patches_BHWIhw.permute(0, 1, 2, 4, 5, 3).flatten(3)
    return linear(columns_BHWN, view_as_matrix(weight), bias).permute(0, 3, 1, 2)


def input_gradient(gradient: Tensor, weight: Tensor, shape: torch.Size, layer: nn.Conv2d) -> Tensor:
    """Return the gradient of an input of `shape` (B, I, H, W), from that of the output (B, O, H, W)."""
    (top, left), (row_stride, column_stride) = zero_borders(layer), layer.stride
    batch, channels, height, width = shape
    columns_BHWN = gradient.permute(0, 2, 3, 1) @ view_as_matrix(weight)
    rows, columns = columns_BHWN.shape[1:3]
    columns_BHWhwI = columns_BHWN.view(*columns_BHWN.shape[:3], *weight.shape[2:], channels)
    # The columns of a 1x1 kernel with stride 1 are the pixels themselves, so nothing has to be added up.
    if columns_BHWhwI.shape[1:5] == (height, width, 1, 1):
        return columns_BHWhwI[:, :, :, 0, 0].permute(0, 3, 1, 2)
    x_BHWI = gradient.new_zeros(batch, height + 2 * top, width + 2 * left, channels)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            x_BHWI[:, i : i + row_stride * rows : row_stride, j : j + column_stride * columns : column_stride] += (
                columns_BHWhwI[:, :, :, i, j]
            )
    inner_BHWI = x_BHWI[:, top : top + height, left : left + width]
    # Cutting off the border leaves gaps between the rows. Without a border nothing is copied.
    return inner_BHWI.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def pads_with_zeros(layer: nn.Module) -> bool:
    """Return True for a plain nn.Conv2d padded with a fixed number of zeros. Subclasses may compute something else."""
    return type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def zero_borders(layer: nn.Conv2d) -> tuple[int, ...]:
    """Return the zero padding: rows above and below, and columns left and right."""
    assert not isinstance(layer.padding, str)
    return layer.padding


def view_as_matrix(weight: Tensor) -> Tensor:
    """View a channels-last weight (O, I, h, w) as (O, N), in the same memory."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


class MatmulConv2d(nn.Conv2d):
    """A convolution with a frozen weight that uses the matrix product where it is faster."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        # `_Product` computes no gradient of the weight, and `linear` needs both factors in one dtype.
        is_plain = x.dim() == 4 and dtype == weight.dtype and not weight.requires_grad
        if not is_plain or not is_better(shape_of_output(x.shape, self), weight, self):
            convolved: Tensor = super()._conv_forward(x, weight, bias)
            return convolved
        y: Tensor = _Product.apply(x.to(dtype), weight, bias, self)  # type: ignore[no-untyped-call]
        return y


# Network modules find layers by class name.
MatmulConv2d.__name__ = MatmulConv2d.__qualname__ = "Conv2d"


class _Product(torch.autograd.Function):
    """The matrix product as an autograd function, which saves only the weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: nn.Conv2d) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.layer = x.shape, layer
        return output(x, weight, bias, layer)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        return input_gradient(gradient, weight, ctx.shape, ctx.layer), None, None, None


def use_matmul_convolutions(module: nn.Module) -> None:
    """Let the frozen convolutions of a model use the matrix product if it is faster, in place.

    Call this after the model is channels last.
    """
    for layer in module.modules():
        if pads_with_zeros(layer):
            # The layer itself changes, so that hooks and references to it stay valid.
            layer.__class__ = MatmulConv2d
