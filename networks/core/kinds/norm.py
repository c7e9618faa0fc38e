"""Training of normalisation layers (train_norm)."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, layer_norm

from networks.core.changes.change import Change, ChangeSize, Forward, Misfit, ModuleTensors, get_weight
from networks.core.registry.adapter_kind import AdapterKind
from networks.core.registry.key_layout import KeyLayout

W_NORM = "w_norm"
B_NORM = "b_norm"
KEY_OF = {"weight": W_NORM, "bias": B_NORM}  # parameter of the layer -> the key of its change


class Norm(nn.Module):
    """Changes of the weight and bias of one LayerNorm or GroupNorm, which start at zero.

    `w_norm` (C) and `b_norm` (C) are float32 and named as in files. A norm without bias has no `b_norm`; files of other
    programs can have `b_norm` alone. There is no alpha, no rank and no dropout.
    """

    fast_keys: frozenset[str] = frozenset()
    size = ChangeSize()
    w_norm: nn.Parameter | None
    b_norm: nn.Parameter | None

    def __init__(self, layer: nn.Module | None, w_norm: Tensor | None, b_norm: Tensor | None) -> None:
        super().__init__()
        for name, change in ((W_NORM, w_norm), (B_NORM, b_norm)):
            self.register_parameter(name, None if change is None else nn.Parameter(change, change.is_floating_point()))
        object.__setattr__(self, "layer", layer)  # not registered: it belongs to the base model
        self.layer: nn.Module | None

    @property
    def changed_parameters(self) -> tuple[str, ...]:
        return tuple(name for name, key in KEY_OF.items() if getattr(self, key) is not None)

    def forward(self, x: Tensor, base: Forward, strength: float) -> Tensor:
        """Return the layer's output with the changes, in the shape and dtype of the layer's own output."""
        layer = self.layer
        assert layer is not None
        merged = {name: self.merged(getattr(layer, name), strength, name) for name in self.changed_parameters}
        weight, bias = merged["weight"], merged.get("bias")
        # The sums of weights and float32 changes stay float32: bfloat16 has no number between 1 and 1.0078, and a small
        # change would be rounded away.
        inputs = x.to(weight.dtype)
        if isinstance(layer, nn.GroupNorm):
            if x.device.type == "cpu" and not x.requires_grad:
                inputs = inputs.contiguous()  # torch crashes in backward: channels-last input without a gradient
            y = group_norm(inputs, layer.num_groups, weight, bias, layer.eps)
        else:
            assert isinstance(layer, nn.LayerNorm)
            y = layer_norm(inputs, layer.normalized_shape, weight, bias, layer.eps)
        # Under autocast norms compute and return float32, but not on the CPU.
        gives_float32 = x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type)
        return y if gives_float32 else y.to(x.dtype)

    def merged(self, base: Tensor, strength: float = 1.0, parameter: str = "weight") -> Tensor:
        key = KEY_OF[parameter]
        change = getattr(self, key)
        assert isinstance(change, Tensor)
        if change.shape != base.shape:
            raise Misfit(key, tuple(change.shape), tuple(base.shape))
        return base + strength * change.to(base.device)

    @torch.no_grad()
    def norm(self) -> Tensor:
        norms = [float(change.double().norm()) for change in self.parameters()]
        return torch.tensor(math.hypot(*norms), dtype=torch.float64)

    @torch.no_grad()
    def scale_(self, ratio: Tensor) -> None:
        for change in self.parameters():
            change.mul_(ratio.to(change))

    def stored_tensors(self) -> Mapping[str, Tensor]:
        return self.state_dict()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        self.load_state_dict({**self.state_dict(), **tensors})


def make_fresh_norm(layer: nn.Module) -> Norm:
    """Make the change of a normalisation layer before training."""
    zeros = torch.zeros(get_weight(layer).shape, dtype=torch.float32)
    return Norm(layer, zeros, None if layer.bias is None else torch.zeros_like(zeros))


def read(tensors: ModuleTensors, layer: nn.Module | None) -> Change:
    return Norm(layer, tensors.get(W_NORM), tensors.get(B_NORM)).requires_grad_(False)


LAYOUT = KeyLayout(
    name="norm",
    words="norm weights",
    needs=(W_NORM,),
    read=read,
    may_have=(B_NORM,),
    namings=frozenset(("kohya", "generic")),
    targets=frozenset(("norm",)),
)
KIND = AdapterKind(merged_layouts=(LAYOUT,))
