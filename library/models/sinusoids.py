"""Sinusoidal embeddings of numbers such as noise levels (Vaswani et al. 2017, section 3.5).

Letters: B samples, F features.
"""

import math

import torch
from torch import Tensor

FREQUENCIES = 256  # F of nearly every denoiser here
MAX_PERIOD = 10_000


def sinusoids(values_B: Tensor, num_features: int = FREQUENCIES) -> Tensor:
    """Embed each value as cosines, then sines, of decreasing frequencies, float32, shape BF."""
    half = num_features // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values_B.device) / half
    angles = values_B.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
