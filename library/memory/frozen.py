"""Frozen layers that ask for their weight when they compute instead of holding on to it.

Letters: O output features, I input features.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from library.memory.forms.form import Form, Parts

Handle = Callable[[], Parts]
"""Gives the stored parts of a weight, from wherever they wait, each time it is called."""


class FrozenLinear(nn.Linear):
    """A Linear layer whose frozen weight is kept in a `form` and asked for through a `handle`.

    The parts are frozen parameters, so that whatever moves or shards a model's parameters takes them along. `weight`
    is decoded whenever it is asked for, in the dtype it had: a copy, so that what was read stays what it was when the
    place of the parts is used for another layer's. A weight that is frozen needs no gradient of its own; the gradient
    of the input decodes it once more, for autograd would keep it in the precision of the run.
    """

    form: Form
    handle: Handle

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        parts = self.handle()
        decoded = self.form.decode(parts, self.form.dtype(parts))
        return decoded.clone() if any(decoded is part for part in parts.values()) else decoded

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The weight (O, I) to compute with in `dtype`."""
        return self.form.decode(self.handle(), dtype)

    def resident_parts(self) -> Parts:
        """The handle of a layer whose parts are its own parameters."""
        return {name: part for name, part in self.named_parameters(recurse=False) if name != "bias"}

    def forward(self, input: Tensor) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        product: Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias.to(product.dtype)


# Network modules find layers by the name of their class, and LyCORIS treats a name it does not know as another kind.
FrozenLinear.__name__ = FrozenLinear.__qualname__ = "Linear"


class _Product(torch.autograd.Function):
    """x @ weight'. What is kept for the backward pass is the layer, not its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        return linear(x, layer.weight_in(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.layer.weight_in(gradient.dtype), None


@torch.no_grad()
def store_in(form: Form, layer: nn.Linear) -> None:
    """Turn a Linear layer into a frozen one in `form`, in place, so that others may hold on to it."""
    parts = form.encode(layer.weight)
    del layer.weight
    layer.__class__ = FrozenLinear
    assert isinstance(layer, FrozenLinear)
    layer.form = form
    for name, part in parts.items():
        layer.register_parameter(name, nn.Parameter(part, requires_grad=False))
    layer.handle = layer.resident_parts


def store_blocks_in(form: Form, model: nn.Module) -> int:
    """Keep the Linear layers inside the blocks of a frozen model in `form`; gives how many there are.

    Blocks are what lies in lists of modules. What stands outside them, such as embedders and the last layer, is small
    and stays as it is, and so do convolutions and norms.
    """
    blocks = [child for module in model.modules() if isinstance(module, nn.ModuleList) for child in module]
    layers = {layer for block in blocks for layer in block.modules() if type(layer) is nn.Linear}
    for layer in layers:
        store_in(form, layer)
    return len(layers)
