"""Frozen layers that fetch and decode their weight for each computation instead of holding it.

Letters: O output features, I input features.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.grad import conv2d_input

from library.base.errors import about
from library.memory import small_convolutions
from library.memory.codecs.codec import Codec, Decoder, Parts
from library.memory.codecs.matmul_8bit import Codes
from library.memory.products_8bit import input_gradient, output

Handle = Callable[[], Parts]
"""A function that returns the stored parts of a weight, wherever they are kept."""


class FrozenLayer(nn.Module):
    """A layer with a frozen weight, stored as parts that a `handle` provides and a `decoder` decodes.

    The parts are frozen parameters, so that moving or sharding a model includes them. `weight` is decoded on each
    access, in its original dtype, as a copy: the value stays valid when the memory of the parts is reused for another
    layer. The backward pass decodes the weight again, because autograd would keep it in the precision of the run.
    """

    decoder: Decoder
    handle: Handle
    weight_shape: torch.Size
    weight_dtype: torch.dtype
    bias: Tensor | None
    multiplies_codes = False  # compute with 8-bit products; `weight` is decoded anyway

    @property
    def weight(self) -> Tensor:
        parts = self.handle()
        decoded = self.decoder.decode(parts, self.weight_shape, self.weight_dtype)
        return decoded.clone() if any(decoded is part for part in parts.values()) else decoded

    @weight.deleter
    def weight(self) -> None:
        # LyCORIS' `algo=full` trains a weight of its own in the place of the layer's.
        raise about("--network_module")(
            "replaces the weights of the base model's layers, which does not work where they are offloaded, sharded "
            "or stored in 8 or 4 bits",
            "remove --blocks_to_swap, --shard_base, --base_format and --fp8_base, or use a kind of adapter that "
            "keeps them",
        )

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return the weight decoded to `dtype` for computing."""
        return self.decoder.decode(self.handle(), self.weight_shape, dtype)

    def own_codes(self) -> Codes | None:
        """Return the stored codes to multiply with, or None if the layer decodes its weight."""
        return self.decoder.codes(self.handle()) if self.multiplies_codes else None

    def own_parts(self) -> Parts:
        """Return the parts that are the layer's own parameters. This is the default handle."""
        return {name: part for name, part in self._parameters.items() if part is not None and name != "bias"}

    def product(self, x: Tensor) -> Tensor:
        """Return the layer's output for `x`, in the dtype of `x`."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        codes = self.own_codes()
        if codes is not None:
            return output(x, codes, bias)
        # With the bias inside the product, plain storage gives the bits of nn.Linear and nn.Conv2d.
        return self.compute(x, self.weight_in(x.dtype), bias)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output for `x` with a decoded weight."""
        raise NotImplementedError

    def input_gradient(self, gradient: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """Return the gradient of an input of this shape, from the gradient of the output."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            # The weight is decoded to the dtype of the input, so autocast's cast has to come first.
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
    """A frozen nn.Conv2d padded with zeros."""

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


# Network modules find layers by class name, and LyCORIS treats an unknown name as another kind of layer.
FrozenLinear.__name__ = FrozenLinear.__qualname__ = "Linear"
FrozenConv2d.__name__ = FrozenConv2d.__qualname__ = "Conv2d"

KINDS: dict[type[nn.Module], type[FrozenLayer]] = {nn.Linear: FrozenLinear, nn.Conv2d: FrozenConv2d}


class _Product(torch.autograd.Function):
    """A layer's product that saves the layer, not its weight, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLayer, trains: bool) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        # No input has a gradient here, so autograd records nothing. The flag only marks the operations for the FLOP
        # counter.
        with torch.set_grad_enabled(trains):
            return layer.product(x.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        codes = ctx.layer.own_codes()
        if codes is not None:
            return input_gradient(gradient, codes), None, None
        return ctx.layer.input_gradient(gradient, ctx.layer.weight_in(gradient.dtype), ctx.shape), None, None


def can_be_frozen(layer: nn.Module) -> bool:
    """Return True if a layer has a frozen version. Subclasses have none, because they may compute something else."""
    return type(layer) is nn.Linear or small_convolutions.pads_with_zeros(layer)


def layers_in_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers inside the blocks of a model that can be frozen, in order, by path.

    Blocks are members of module lists. Layers outside them, such as embedders and the last layer, are small and stay
    unchanged; so do norms.
    """
    prefixes = [
        f"{path}.{name}."
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for name, _ in module.named_children()
    ]
    # The path of a model that is a module list itself is empty.
    block_prefixes = tuple(prefix.removeprefix(".") for prefix in prefixes)
    return {
        path: layer
        for path, layer in model.named_modules()
        if f"{path}.".startswith(block_prefixes) and can_be_frozen(layer)
    }


def frozen_layers(block: nn.Module) -> Iterator[FrozenLayer]:
    return (layer for layer in block.modules() if isinstance(layer, FrozenLayer))


@torch.no_grad()
def freeze_layer(codec: Codec, layer: nn.Module, weight: Tensor | None = None) -> None:
    """Convert a layer in place to its frozen version, stored by `codec`. References to the layer stay valid.

    `weight` replaces the layer's own, which may have no values yet.
    """
    original = layer.weight if weight is None else weight
    assert isinstance(original, Tensor)
    freeze_encoded(codec, layer, codec.encode(original), original.shape, original.dtype)


def freeze_encoded(decoder: Decoder, layer: nn.Module, parts: Parts, shape: torch.Size, dtype: torch.dtype) -> None:
    """Convert a layer in place to its frozen version, from the encoded parts of a weight with this shape and dtype."""
    del layer.weight
    layer.__class__ = KINDS[type(layer)]
    assert isinstance(layer, FrozenLayer)
    layer.decoder, layer.weight_shape, layer.weight_dtype = decoder, shape, dtype
    for name, part in parts.items():
        layer.register_parameter(name, nn.Parameter(part, requires_grad=False))
    layer.handle = layer.own_parts


def freeze_layers(codec: Codec, layers: Iterable[nn.Module]) -> int:
    """Store with `codec` all layers that can be frozen and are not frozen yet. Return the number of frozen layers."""
    layers = list(layers)
    for layer in layers:
        if can_be_frozen(layer):
            freeze_layer(codec, layer)
    return sum(isinstance(layer, FrozenLayer) for layer in layers)


def multiply_codes(layers: Iterable[FrozenLayer]) -> int:
    """Enable 8-bit products in the layers that support them; return their number."""
    count = 0
    for layer in layers:
        codes = layer.decoder.codes(layer.handle()) if isinstance(layer, FrozenLinear) else None
        layer.multiplies_codes = codes is not None and codes.can_be_multiplied
        count += layer.multiplies_codes
    return count
