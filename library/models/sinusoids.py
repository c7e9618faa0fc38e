"""Sinusoidal embeddings of numbers such as noise levels (Vaswani et al. 2017, section 3.5).

Letters: B samples, F features, V width of an embedding.
"""

import math

import torch
from torch import Tensor, nn

FREQUENCIES = 256  # F of nearly every denoiser here
MAX_PERIOD = 10_000


def sinusoids(values_B: Tensor, num_features: int = FREQUENCIES) -> Tensor:
    """Embed each value as cosines, then sines, of decreasing frequencies, float32, shape BF."""
    half = num_features // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values_B.device) / half
    # In bfloat16, timesteps between 512 and 1000 would be rounded to multiples of 4.
    angles = values_B.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    """An embedding of the noise level: sinusoids, then two linear layers with SiLU in between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, width))

    def forward(self, levels_B: Tensor, dtype: torch.dtype) -> Tensor:
        embedding_BV: Tensor = self.mlp(sinusoids(levels_B).to(dtype))
        return embedding_BV
