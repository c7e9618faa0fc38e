"""Layers shared by the denoiser and the approximator; their weights have the checkpoints' names."""

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

EPS = 1e-6


class MLPEmbedder(nn.Module):
    """Two linear layers with SiLU in between."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_features, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out_layer(silu(self.in_layer(x)))
        return y


class RMSNorm(nn.Module):
    """Root mean square norm over the last axis, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()  # autograd saves it, and with a view the whole base tensor
        return rms_norm(x.float(), x.shape[-1:], eps=EPS).to(x.dtype) * self.scale.to(x.dtype)
