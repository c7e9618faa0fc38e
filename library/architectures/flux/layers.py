"""Layers that the denoiser and an approximator are made of; the names of their weights are the checkpoints'."""

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu

EPS = 1e-6


class MLPEmbedder(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_features, width)
        self.out_layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out_layer(silu(self.in_layer(x)))
        return y


class RMSNorm(nn.Module):
    """Root mean square over the last axis, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()  # it is kept for the backward pass, and were it a part of something, all of that
        return rms_norm(x.float(), x.shape[-1:], eps=EPS).to(x.dtype) * self.scale.to(x.dtype)
