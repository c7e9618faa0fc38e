"""Taking a layer's forward and giving it back: how an adapter acts without changing the base model's module tree."""

from torch import nn

from library.errors import UserError
from networks.core.changes.change import Forward


def take_forward(layer: nn.Module, forward: Forward) -> Forward:
    """Put `forward` in place of the layer's own; gives the one that was there."""
    base: Forward = layer.forward
    layer.forward = forward  # type: ignore[assignment]
    return base


def give_forward_back(layer: nn.Module, forward: Forward, base: Forward, path: str) -> None:
    """Undo `take_forward`. Raises UserError naming the layer where something wrapped it again since."""
    if layer.__dict__.get("forward") != forward:
        raise UserError(f"{path} was wrapped again after this adapter; remove the later wrapping first")
    del layer.__dict__["forward"]
    if base != layer.forward:  # it was wrapped before us
        layer.forward = base  # type: ignore[assignment]
