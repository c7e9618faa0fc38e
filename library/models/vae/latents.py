"""Encoding of pixels to the latents of a VAE, and decoding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.memory.devices import send
from library.protocols import LatentSpec


@dataclass(frozen=True)
class KlLatents:
    """Latents of diffusers' AutoencoderKL; samples of the posterior are cached before shift and scale."""

    spec: LatentSpec
    scale: float  # scales latents to about unit variance
    shift: float = 0.0  # subtracted before scaling

    def encode(self, vae: nn.Module, pixels_BCHW: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        """Sample the posterior, float32, unscaled: mean + std * noise, with each sample's own generator; without
        generators return the mean."""
        model: Any = vae
        posterior = model.encode(pixels_BCHW.to(model.device, model.dtype)).latent_dist
        mean_BCHW: Tensor = posterior.mean.float()
        if generators is None:
            return mean_BCHW
        std_BCHW: Tensor = posterior.std.float()
        assert len(generators) == len(pixels_BCHW)
        noise_BCHW = torch.stack([torch.randn(mean_BCHW.shape[1:], generator=g) for g in generators])
        return mean_BCHW + std_BCHW * send(noise_BCHW, mean_BCHW.device)

    def normalize(self, latents_BCHW: Tensor) -> Tensor:
        return (latents_BCHW - self.shift) * self.scale

    def decode(self, vae: nn.Module, latents_BCHW: Tensor) -> Tensor:
        """Decode latents as the denoiser sees them to images, float32, about -1..1."""
        model: Any = vae
        latents_BCHW = latents_BCHW / self.scale + self.shift
        pixels_BCHW: Tensor = model.decode(latents_BCHW.to(model.device, model.dtype)).sample
        return pixels_BCHW.float()
