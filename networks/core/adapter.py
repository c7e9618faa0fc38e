"""One adapted module."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from networks.core.delta import Delta
from networks.core.join import Join
from networks.core.targets import Site


@dataclass(frozen=True)
class Dropout:
    """What is left out while training, as chances; all of it acts on the change only, never on the base model."""

    neuron: float = 0.0  # single numbers of the R channels, the others scaled up (--network_dropout)
    rank: float = 0.0  # whole channels of a sample, the others scaled up
    module: float = 0.0  # the whole change of this call; nothing is scaled


class Adapter(nn.Module):
    """A change of one layer: y = base(x) + multiplier * alpha / rank * up(down(x)).

    It borrows the layer's forward while installed, so the base model's module tree, keys and hooks stay as they were.
    `alpha` and the factors are named as in files: the delta's child modules are children here. Random numbers come
    from torch's default generators, so recomputing a checkpointed block repeats them.
    """

    alpha: Tensor

    def __init__(self, site: Site, delta: Delta, join: Join, alpha: float, drops: Dropout, multiplier: float) -> None:
        super().__init__()
        self.site = site
        self.join = join
        self.drops = drops
        self.multiplier = multiplier
        self.register_buffer("alpha", torch.tensor(float(alpha or delta.rank), dtype=torch.float32))
        self.alpha_value = float(alpha or delta.rank)  # read every call: no transfer from the device, no rounding
        for name, child in delta.named_children():
            self.add_module(name, child)
        object.__setattr__(self, "delta", delta)  # registered above by its children: names in files have no such level
        self.delta: Delta
        self._base_forward: Callable[[Tensor], Tensor] | None = None
        self.register_load_state_dict_post_hook(_read_alpha)  # type: ignore[no-untyped-call]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha_value / self.delta.rank

    @property
    def is_installed(self) -> bool:
        return self._base_forward is not None

    def install(self) -> None:
        """Take the layer's forward."""
        assert not self.is_installed
        self._base_forward = self.site.module.forward
        self.site.module.forward = self.forward

    def remove(self) -> None:
        """Give the layer's forward back; what was installed later must be removed first."""
        if not self.is_installed:
            return
        layer = self.site.module
        if layer.__dict__.get("forward") != self.forward:
            raise ValueError(f"{self.site.path} was wrapped again after this adapter; remove the later wrapping first")
        del layer.__dict__["forward"]
        if self._base_forward != layer.forward:  # it was wrapped before us
            layer.forward = self._base_forward  # type: ignore[assignment]
        self._base_forward = None

    def forward(self, x: Tensor) -> Tensor:
        """What the layer computes with the change; shapes and dtype are those of the layer alone."""
        assert self._base_forward is not None
        base = self._base_forward(x)
        if self.multiplier == 0 or self._skips_this_call():
            return base
        return self.delta.up(self._drop_and_scale(self.delta.down(x)), base)

    def change(self) -> Tensor:
        """The change of the weight at this multiplier, in the layer's shape and at least in float32."""
        weight = self.delta.weight()
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) * (self.multiplier * self.scale)

    def merged_weight(self) -> Tensor:
        """The weight that computes the same without an adapter, at least in float32."""
        base = self.site.module.weight
        assert isinstance(base, Tensor)
        change = self.change().to(base.device)
        return self.join.merge(base.to(torch.promote_types(base.dtype, change.dtype)), change)

    def _skips_this_call(self) -> bool:
        return self.training and self.drops.module > 0 and float(torch.rand(())) < self.drops.module

    def _drop_and_scale(self, hidden: Tensor) -> Tensor:
        strength = self.multiplier * self.scale
        if self.training:
            if self.drops.neuron > 0:
                hidden = dropout(hidden, self.drops.neuron)
            if self.drops.rank > 0:
                hidden = hidden * self._rank_mask(hidden)
                strength /= 1 - self.drops.rank
        return hidden if strength == 1 else hidden * strength

    def _rank_mask(self, hidden: Tensor) -> Tensor:
        """0 or 1 for every sample and channel, in a shape that meets `hidden`."""
        is_conv = isinstance(self.site.module, nn.Conv2d)
        num_samples, rank = hidden.shape[0], hidden.shape[1 if is_conv else -1]
        keep_BR = torch.rand(num_samples, rank, device=hidden.device) > self.drops.rank
        shape = (num_samples, rank, 1, 1) if is_conv else (num_samples, *(1,) * (hidden.dim() - 2), rank)
        return keep_BR.to(hidden.dtype).view(shape)


def _read_alpha(adapter: nn.Module, _: Any) -> None:
    """After loading weights the strength follows the alpha that was loaded."""
    assert isinstance(adapter, Adapter)
    if not adapter.alpha.is_meta:
        adapter.alpha_value = float(adapter.alpha)
