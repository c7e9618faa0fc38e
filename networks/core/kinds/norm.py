"""Training of normalisation layers (train_norm)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm, layer_norm

from networks.core.forward_patch import Forward, give_forward_back, take_forward
from networks.core.sites.targets import Site


class NormAdapter(nn.Module):
    """Changes of the weight and bias of one LayerNorm or GroupNorm, multiplied by `multiplier`; they start at zero.

    `w_norm` (C) and `b_norm` (C) are float32 and named as in files; a norm without bias has no `b_norm`. They have no
    alpha and no rank, and no dropout acts on them. The layer's forward is borrowed while installed.
    """

    delta = None  # it has no factors
    b_norm: nn.Parameter | None

    def __init__(self, site: Site, multiplier: float) -> None:
        super().__init__()
        self.site = site
        self.multiplier = multiplier
        weight = site.module.weight
        assert isinstance(weight, Tensor)
        self.w_norm = nn.Parameter(torch.zeros(weight.shape, dtype=torch.float32))
        has_bias = site.module.bias is not None
        self.register_parameter("b_norm", nn.Parameter(torch.zeros_like(self.w_norm)) if has_bias else None)
        self._base_forward: Forward | None = None

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
        """What the layer computes with the changes; shapes and dtype are those of the layer alone."""
        assert self._base_forward is not None
        if self.multiplier == 0:
            return self._base_forward(x)
        layer, merged = self.site.module, self.merged()
        weight, bias = merged["weight"], merged.get("bias")
        given = x.to(weight.dtype)
        if isinstance(layer, nn.GroupNorm):
            if x.device.type == "cpu" and not x.requires_grad:
                given = given.contiguous()  # torch crashes in the backward pass of channels-last groups without one
            y = group_norm(given, layer.num_groups, weight, bias, layer.eps)
        else:
            assert isinstance(layer, nn.LayerNorm)
            y = layer_norm(given, layer.normalized_shape, weight, bias, layer.eps)
        # Autocast has norms compute and answer in float32, but not on the CPU.
        gives_float32 = x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type)
        return y if gives_float32 else y.to(x.dtype)

    def merged(self) -> Mapping[str, Tensor]:
        """What the layer's parameters become when the adapter is merged into them, by name, at least in float32."""
        layer, merged = self.site.module, {}
        for name, change in (("weight", self.w_norm), ("bias", self.b_norm)):
            if change is not None:
                base = getattr(layer, name)
                merged[name] = base + self.multiplier * change.to(base.device)
        return merged
