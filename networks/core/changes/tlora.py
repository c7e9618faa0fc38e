"""T-LoRA: how many ranks of an adapter act depends on how much noise a sample has.

Letters: B samples, R rank, K channels between down and up, a multiple of R.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDED = 1e-4  # of a rank: a level in float32 may lie this far below the whole number that it stands for


@dataclass(frozen=True)
class TLoraRanks:
    """T-LoRA (Soboleva et al. 2025, arXiv:2507.05964): r(s) = floor((1 - s)^power (R - least)) + least.

    s is the share of noise, 0 to 1. Only the first r ranks act on a sample, so pure noise trains the first `least`
    of them and fine detail all R. The strength stays that of the full rank.
    """

    least: int
    power: float

    def ranks(self, rank: int, levels_B: Tensor) -> Tensor:
        """r of every sample, whole numbers from `least`, or R where that is smaller, to R."""
        least = min(self.least, rank)
        shares_B = (1 - levels_B.float()).clamp(0, 1) ** self.power
        return (shares_B * (rank - least) + ROUNDED).floor().long().clamp_max(rank - least) + least

    def kept(self, rank: int, num_channels: int, levels_B: Tensor) -> Tensor:
        """(B, K), True for channels that act; each group of R channels is an adapter of its own."""
        place_K = torch.arange(num_channels, device=levels_B.device) % rank
        return place_K < self.ranks(rank, levels_B)[:, None]
