"""Pixels to the latents of FLUX.1, and back."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.architectures.interface import LatentSpec
from library.models.latents import KlLatents

SPEC = LatentSpec(channels=16, downscale=8, bucket_step=16, cache_suffix="_flux.npz", keys_carry_size=True)
VAE_LATENTS = KlLatents(SPEC, scale=0.3611, shift=0.1159)


@dataclass(frozen=True)
class FluxLatents:
    """Latents of 16 channels, 8 pixels a side; the cache keeps them shifted and scaled, as the denoiser sees them."""

    spec: LatentSpec = SPEC

    def encode(self, vae: nn.Module, pixels_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Samples of the posterior less 0.1159, times 0.3611, float32."""
        return VAE_LATENTS.normalize(VAE_LATENTS.encode(vae, pixels_BCHW, generators))

    def normalize(self, latents_BCHW: Tensor) -> Tensor:
        return latents_BCHW

    def decode(self, vae: nn.Module, latents_BCHW: Tensor) -> Tensor:
        """Pictures, float32, about -1..1, of latents as the denoiser sees them."""
        return VAE_LATENTS.decode(vae, latents_BCHW)
