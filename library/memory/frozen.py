"""Frozen layers that ask for their weight when they compute instead of holding on to it.

Letters: O output features, I input features.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.grad import conv2d_input

from library.memory import small_convolutions
from library.memory.codecs.codec import Codec, Decoder, Parts
from library.memory.codecs.matmul_8bit import Codes, input_gradient, output

Handle = Callable[[], Parts]
"""Gives the stored parts of a weight, from wherever they wait, each time it is called."""


class FrozenLayer(nn.Module):
    """A layer whose frozen weight is stored as parts, which a `handle` gives and a `decoder` turns into the weight.

    The parts are frozen parameters, so that whatever moves or shards a model's parameters takes them along. `weight`
    is decoded whenever it is asked for, in the dtype it had: a copy, so that what was read stays what it was when the
    place of the parts is used for another layer's. A weight that is frozen needs no gradient of its own; the gradient
    of the input decodes it once more, for autograd would keep it in the precision of the run.
    """

    decoder: Decoder
    handle: Handle
    weight_shape: torch.Size
    weight_dtype: torch.dtype
    bias: Tensor | None
    multiplies_codes = False  # whether the product is one of 8-bit numbers; the weight that is read is decoded anyway

    @property
    def weight(self) -> Tensor:
        parts = self.handle()
        decoded = self.decoder.decode(parts, self.weight_shape, self.weight_dtype)
        return decoded.clone() if any(decoded is part for part in parts.values()) else decoded

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight to compute with in `dtype`, before anything else asks for one."""
        return self.decoder.decode(self.handle(), self.weight_shape, dtype)

    def own_codes(self) -> Codes | None:
        """What the layer multiplies with as it is stored; None where it decodes its weight."""
        return self.decoder.codes(self.handle()) if self.multiplies_codes else None

    def own_parts(self) -> Parts:
        """The handle of a layer whose parts are its own parameters."""
        return {name: part for name, part in self._parameters.items() if part is not None and name != "bias"}

    def product(self, x: Tensor) -> Tensor:
        """What the layer makes of `x`, in its dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        codes = self.own_codes()
        if codes is not None:
            return output(x, codes, bias)
        return self.compute(x, self.weight_in(x.dtype), bias)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the layer makes of `x`."""
        raise NotImplementedError

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of an input of that shape, from the gradient of the output."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        product: Tensor = _Product.apply(input, self, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
        return product


class FrozenLinear(FrozenLayer, nn.Linear):  # type: ignore[misc, override]
    """A frozen nn.Linear."""

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(x, weight, bias)

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        return gradient @ weight


class FrozenConv2d(FrozenLayer, nn.Conv2d):  # type: ignore[misc, override]
    """A frozen nn.Conv2d whose padding is a number of zeros."""

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if small_convolutions.is_better(small_convolutions.shape_of_output(x.shape, self), weight, self):
            return small_convolutions.output(x, weight, bias, self)
        y: Tensor = self._conv_forward(x, weight, bias)
        return y

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        if small_convolutions.is_better(gradient.shape, weight, self):
            return small_convolutions.input_gradient(gradient, weight, shape, self)
        geometry = self.stride, self.padding, self.dilation, self.groups
        x_gradient: Tensor = conv2d_input(shape, weight, gradient, *geometry)  # type: ignore[no-untyped-call]
        return x_gradient


# Network modules find layers by the name of their class, and LyCORIS treats a name it does not know as another kind.
FrozenLinear.__name__ = FrozenLinear.__qualname__ = "Linear"
FrozenConv2d.__name__ = FrozenConv2d.__qualname__ = "Conv2d"

KINDS: dict[type[nn.Module], type[FrozenLayer]] = {nn.Linear: FrozenLinear, nn.Conv2d: FrozenConv2d}


class _Product(torch.autograd.Function):
    """A layer's product. What is kept for the backward pass is the layer, not its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLayer, trains: bool) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        # Nothing here needs a gradient, so nothing is recorded; but who counts arithmetic asks whether there could be.
        with torch.set_grad_enabled(trains):
            return layer.product(x.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        codes = ctx.layer.own_codes()
        if codes is not None:
            return input_gradient(gradient, codes), None, None
        return ctx.layer.input_gradient(gradient, ctx.layer.weight_in(gradient.dtype), ctx.shape), None, None


def can_be_frozen(layer: nn.Module) -> bool:
    """Whether there is a frozen twin of a layer; subclasses may compute something else, and are left alone."""
    return type(layer) is nn.Linear or small_convolutions.pads_with_zeros(layer)


def layers_in_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The layers inside the blocks of a model that can be frozen, by their paths, in order.

    Blocks are what lies in lists of modules. What stands outside them, such as embedders and the last layer, is small
    and stays as it is, and so do norms.
    """
    stems = [
        f"{path}.{name}."
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for name, _ in module.named_children()
    ]
    starts = tuple(stem.removeprefix(".") for stem in stems)
    return {
        path: layer for path, layer in model.named_modules() if f"{path}.".startswith(starts) and can_be_frozen(layer)
    }


def frozen_layers(block: nn.Module) -> Iterator[FrozenLayer]:
    """The layers of a block whose weights are stored by a codec."""
    return (layer for layer in block.modules() if isinstance(layer, FrozenLayer))


@torch.no_grad()
def store_in(codec: Codec, layer: nn.Module, weight: Tensor | None = None) -> None:
    """Turn a layer into its frozen twin, stored by `codec`, in place, so that others may hold on to it.

    `weight` stands in for the layer's own, which may have no values yet.
    """
    whole = layer.weight if weight is None else weight
    assert isinstance(whole, Tensor)
    keep_in(codec, layer, codec.encode(whole), whole.shape, whole.dtype)


def keep_in(decoder: Decoder, layer: nn.Module, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> None:
    """The same with the parts of a weight of that shape and dtype at hand."""
    del layer.weight
    layer.__class__ = KINDS[type(layer)]
    assert isinstance(layer, FrozenLayer)
    layer.decoder, layer.weight_shape, layer.weight_dtype = decoder, shape, dtype
    for name, part in parts.items():
        layer.register_parameter(name, nn.Parameter(part, requires_grad=False))
    layer.handle = layer.own_parts


def store_all_in(codec: Codec, layers: Iterable[nn.Module]) -> int:
    """Store the layers that can be and are not frozen yet by `codec`; return how many frozen ones there are."""
    layers = list(layers)
    for layer in layers:
        if can_be_frozen(layer):
            store_in(codec, layer)
    return sum(isinstance(layer, FrozenLayer) for layer in layers)


def multiply_codes(layers: Iterable[FrozenLayer]) -> int:
    """Let those of the layers compute with 8-bit numbers that can; gives how many do."""
    count = 0
    for layer in layers:
        codes = layer.decoder.codes(layer.handle()) if isinstance(layer, FrozenLinear) else None
        layer.multiplies_codes = codes is not None and codes.can_be_multiplied
        count += layer.multiplies_codes
    return count
