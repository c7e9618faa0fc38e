"""Dropout of a change in training.

Letters: B samples, K channels between down and up.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from networks.core.arguments.common import DropoutArguments
from networks.core.arguments.network_arguments import NetworkArguments


@dataclass(frozen=True)
class Dropout:
    """Dropout probabilities. They apply to the change only, never to the base model."""

    neuron: float = 0.0  # single values between down and up; the others are scaled up (`network_dropout`)
    rank: float = 0.0  # whole channels of a sample between down and up; the others are scaled up
    module: float = 0.0  # the whole change in one call; nothing is scaled

    @classmethod
    def of(cls, arguments: NetworkArguments) -> "Dropout":
        """Read the probabilities from the network arguments."""
        dropouts = arguments.of(DropoutArguments)
        return cls(dropouts.neuron_dropout, dropouts.rank_dropout, dropouts.module_dropout)

    @property
    def is_on(self) -> bool:
        return bool(self.neuron or self.rank or self.module)

    def skips_this_call(self) -> bool:
        """Return True, at random, if the change is dropped in this call. Call it in training only."""
        # Drawn on the CPU, since the host would have to wait for a number from the GPU.
        return self.module > 0 and float(torch.rand(())) < self.module

    def drop(self, hidden: Tensor, layer: nn.Module | None) -> Tensor:
        """Drop values and channels. The caller divides by 1 - `rank` to scale up the remaining channels."""
        if self.neuron > 0:
            hidden = dropout(hidden, self.neuron)
        if self.rank > 0:
            keep_BK = torch.rand(len(hidden), num_channels(hidden, layer), device=hidden.device) > self.rank
            hidden = hidden * per_channel(keep_BK, hidden, layer)
        return hidden


NO_DROPOUT = Dropout()


def num_channels(hidden: Tensor, layer: nn.Module | None) -> int:
    """Return K, the channels between down and up."""
    return hidden.shape[1 if isinstance(layer, nn.Conv2d) else -1]


def per_channel(keep_BK: Tensor, hidden: Tensor, layer: nn.Module | None) -> Tensor:
    """Return 0 or 1 for every sample and channel, in a shape that broadcasts with `hidden`."""
    ones = (1,) * (hidden.dim() - 2)
    num_samples, num_kept = keep_BK.shape
    shape = (num_kept, *ones) if isinstance(layer, nn.Conv2d) else (*ones, num_kept)
    return keep_BK.to(hidden.dtype).view(num_samples, *shape)
