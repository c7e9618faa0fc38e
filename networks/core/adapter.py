"""One adapted module."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from networks.core.forward_patch import Forward, give_forward_back, take_forward
from networks.core.kinds.joins import Join, scale_columns
from networks.core.kinds.lora import Delta, down_by_columns, factor
from networks.core.sites.targets import Site


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

    `scalar` (use_scalar) is a trained number that multiplies the change; files have it multiplied into `lora_up`. It
    starts at 0, and the up factor then as the down factor does, so the change still starts at zero. `dora_scale` (1, I)
    or (1, I, 1, 1) are the magnitudes of a join that has some: every input column of the changed weight is brought to
    its magnitude, which is done to the input instead, so that no weight is built. Dropout acts on the low-rank path;
    the norms are those of the whole change.
    """

    alpha: Tensor
    scalar: nn.Parameter | None
    dora_scale: nn.Parameter | None

    def __init__(
        self,
        site: Site,
        delta: Delta,
        join: Join,
        alpha: float,
        drops: Dropout,
        multiplier: float,
        has_scalar: bool = False,
    ) -> None:
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
        magnitudes = join.magnitudes()
        self.register_parameter("dora_scale", None if magnitudes is None else nn.Parameter(magnitudes))
        self.register_parameter("scalar", nn.Parameter(torch.tensor(0.0)) if has_scalar else None)
        if has_scalar:
            nn.init.kaiming_uniform_(factor(dict(delta.named_children())["lora_up"]), a=math.sqrt(5))
        self._base_forward: Forward | None = None
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
        self._base_forward = take_forward(self.site.module, self.forward)

    def remove(self) -> None:
        """Give the layer's forward back; what was installed later must be removed first."""
        if self._base_forward is None:
            return
        give_forward_back(self.site.module, self.forward, self._base_forward, self.site.path)
        self._base_forward = None

    def forward(self, x: Tensor) -> Tensor:
        """What the layer computes with the change; shapes and dtype are those of the layer alone."""
        assert self._base_forward is not None
        if self.multiplier == 0 or self._skips_this_call():
            return self._base_forward(x)
        if self.dora_scale is None:
            base = self._base_forward(x)
            return self.delta.up(self._drop_and_scale(self.delta.down(x)), base)
        columns = self.join.columns(self._base_weight, self.dora_scale, *self.delta.factors(), self._unit_strength)
        whole = columns if self.multiplier == 1 else 1 + self.multiplier * (columns - 1)
        base = self._base_forward(scale_columns(x, whole))
        return self.delta.up(self._drop_and_scale(down_by_columns(self.delta, x, columns)), base)

    def change(self) -> Tensor:
        """What is added to the weight at this multiplier, before magnitudes, in its shape and at least in float32."""
        return self._unit_change() * self.multiplier

    def merged_weight(self) -> Tensor:
        """The weight that computes the same without an adapter, at least in float32."""
        base, change = self._base_weight, self._unit_change().to(self._base_weight.device)
        return self.join.merge(
            base.to(torch.promote_types(base.dtype, change.dtype)), change, self.multiplier, self.dora_scale
        )

    def merged(self) -> Mapping[str, Tensor]:
        """What the layer's parameters become when the adapter is merged into them, by name."""
        return {"weight": self.merged_weight()}

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The Frobenius norm of the change at multiplier 1, before magnitudes, from the small factors alone."""
        up_OR, down_RN = (part.float() for part in self.delta.factors())
        square = ((up_OR.t() @ up_OR) * (down_RN @ down_RN.t())).sum()
        strength = torch.as_tensor(self._unit_strength, device=square.device)
        return square.clamp_min(0).sqrt() * strength.abs()

    @torch.no_grad()
    def shrink(self, ratio: Tensor) -> None:
        """Multiply the change by a number, shared out evenly to the factors that train."""
        factors = [factor(module) for _, module in self.delta.named_children()]
        trained = [weight for weight in factors if weight.requires_grad] or factors
        for weight in trained:
            weight.mul_(ratio.to(weight) ** (1 / len(trained)))

    @torch.no_grad()
    def restart_magnitudes(self) -> None:
        """Set the magnitudes to the norms of the weight with the change: together they compute what the sum does."""
        assert self.dora_scale is not None
        weight = self._base_weight
        up_OR, down_RN = (part.to(weight.device) for part in self.delta.factors())
        strength = self._unit_strength
        strength = strength.to(weight.device) if isinstance(strength, Tensor) else strength
        ones = torch.ones_like(self.dora_scale, device=weight.device)
        self.dora_scale.copy_(ones / self.join.columns(weight, ones, up_OR, down_RN, strength))

    @property
    def _base_weight(self) -> Tensor:
        weight = self.site.module.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def _unit_strength(self) -> Tensor | float:
        """What the product of the factors is multiplied by at multiplier 1."""
        if self.scalar is None:
            return self.scale
        strength: Tensor = self.scale * self.scalar
        return strength

    def _unit_change(self) -> Tensor:
        weight = self.delta.weight()
        return weight.to(torch.promote_types(weight.dtype, torch.float32)) * self._unit_strength

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapter":
        """Move or cast. Magnitudes are never rounded to 16 bits: they would change the base model's own columns."""
        exact = None if self.dora_scale is None else self.dora_scale.detach()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.dora_scale is not None and exact is not None and self.dora_scale.dtype.itemsize == 2:
            self.dora_scale.data = exact.to(self.dora_scale.device)
        return self

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
        if self.scalar is not None:
            hidden = hidden * self.scalar
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
