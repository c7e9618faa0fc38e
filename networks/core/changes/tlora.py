"""T-LoRA: the noise level of a sample determines how many ranks of an adapter act.

Letters: B samples, R rank, K channels between down and up, a multiple of R.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from library.options.declared import Needs, declare
from networks.core.arguments.values import POSITIVE, SWITCH, UNIT
from networks.core.changes.dropout import num_channels, per_channel

WITH_TLORA = Needs((("tlora",),), "tlora=True or networks.tlora")

ROUNDED = 1e-4  # in ranks: float32 rounding can put a level this far below a whole number


@dataclass(frozen=True)
class TLoraArguments:
    """The network arguments of T-LoRA."""

    tlora: bool = declare(SWITCH, False)
    """T-LoRA: the noisier a sample, the fewer ranks act on it."""
    tlora_min_rank: int = declare(UNIT, 1, needs=WITH_TLORA)
    """The ranks that act on pure noise."""
    tlora_power: float = declare(POSITIVE, 1.0, needs=WITH_TLORA)
    """Power of the share of the signal that the ranks follow; 1 is linear."""

    label: ClassVar[str] = "tlora"
    switches: ClassVar[tuple[str, ...]] = ("tlora",)
    made_for: ClassVar[str] = "it counts the ranks between the two factors of a LoRA"
    excludes: ClassVar[Mapping[str, str]] = {
        "dora_wd": "its magnitudes divide by the norm of one changed weight, but with T-LoRA every sample of a batch "
        "has its own"
    }

    @property
    def is_on(self) -> bool:
        return self.tlora


@dataclass
class NoiseLevels:
    """Noise level, 0 to 1, of each sample in the next denoiser call; None without a batch, as in previews."""

    levels_B: Tensor | None = None


@dataclass(frozen=True)
class NoiseMask:
    """T-LoRA (Soboleva et al. 2025, arXiv:2507.05964): r(s) = floor((1 - s)^power (R - least)) + least.

    s is the share of noise, 0 to 1. Only the first r ranks act on a sample, so pure noise trains the first `least`
    of them and fine detail all R. The strength stays that of the full rank. Where `noise` has no levels, all ranks act.
    """

    least: int
    power: float
    noise: NoiseLevels

    def ranks(self, rank: int, levels_B: Tensor) -> Tensor:
        """Return r for every sample, integers from `least` (or R if that is smaller) to R."""
        min_rank = min(self.least, rank)
        shares_B = (1 - levels_B.float()).clamp(0, 1) ** self.power
        return (shares_B * (rank - min_rank) + ROUNDED).floor().long().clamp_max(rank - min_rank) + min_rank

    def kept(self, rank: int, num_channels: int, levels_B: Tensor) -> Tensor:
        """Return a mask (B, K), True for active channels. Each group of R channels counts as a separate adapter."""
        index_K = torch.arange(num_channels, device=levels_B.device) % rank
        return index_K < self.ranks(rank, levels_B)[:, None]

    def __call__(self, hidden: Tensor, rank: int, layer: nn.Module | None) -> Tensor:
        """Return `hidden`, what lies between down and up, with 0 in the channels that do not act."""
        levels_B = self.noise.levels_B
        # Previews draw with all ranks, as other programs do with the file.
        if levels_B is None:
            return hidden
        if len(hidden) != len(levels_B):
            raise RuntimeError(f"a layer runs {len(hidden)} samples, but there are noise levels of {len(levels_B)}")
        keep_BK = self.kept(rank, num_channels(hidden, layer), levels_B.to(hidden.device))
        return hidden * per_channel(keep_BK, hidden, layer)
