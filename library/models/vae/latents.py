"""Encoding of pixels to the latents of a VAE, and decoding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.memory.devices import send
from library.protocols import LatentSpec


@dataclass(frozen=True)
class KlLatents:
    """Latents of diffusers' AutoencoderKL. The cache holds posterior samples or means, before or after shift and
    scale."""

    spec: LatentSpec
    scale: float  # scales latents to about unit variance
    shift: float = 0.0  # subtracted before scaling
    caches_normalized: bool = False  # cached after shift and scale
    takes_mean: bool = False  # of the posterior, in place of a sample

    def encode(self, vae: nn.Module, pixels_BCHW: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        """Return samples of the posterior, float32: mean + std * noise, with each image's own generator.

        Without generators, or with `takes_mean`, return the mean. With `caches_normalized` the result is shifted and
        scaled.
        """
        model: Any = vae
        posterior = model.encode(pixels_BCHW.to(model.device, model.dtype)).latent_dist
        latents_BCHW: Tensor = posterior.mean.float()
        if generators is not None and not self.takes_mean:
            assert len(generators) == len(pixels_BCHW)
            # From each image's own generator, so that latents do not depend on the batch.
            noise_BCHW = torch.stack([torch.randn(latents_BCHW.shape[1:], generator=g) for g in generators])
            latents_BCHW = latents_BCHW + posterior.std.float() * send(noise_BCHW, latents_BCHW.device)
        return (latents_BCHW - self.shift) * self.scale if self.caches_normalized else latents_BCHW

    def normalize(self, latents_BCHW: Tensor) -> Tensor:
        return latents_BCHW if self.caches_normalized else (latents_BCHW - self.shift) * self.scale

    def decode(self, vae: nn.Module, latents_BCHW: Tensor) -> Tensor:
        """Decode latents after shift and scale to images, float32, about -1..1."""
        model: Any = vae
        latents_BCHW = latents_BCHW / self.scale + self.shift
        pixels_BCHW: Tensor = model.decode(latents_BCHW.to(model.device, model.dtype)).sample
        return pixels_BCHW.float()


@dataclass(frozen=True)
class NormalizedLatents:
    """Latents with a mean and a deviation for each channel, cached in the normalized form that the denoiser gets."""

    spec: LatentSpec
    statistics: Callable[[Any, torch.device], tuple[Tensor, Tensor]]  # of a VAE's latents: mean, deviation
    encode_mean: Callable[[Any, Tensor], Tensor]  # (VAE, pixels BCHW) -> the posterior's mean, BCHW
    decode_latents: Callable[[Any, Tensor], Tensor]  # (VAE, its latents BCHW, float32) -> pixels BCHW

    def encode(self, vae: nn.Module, pixels_BCHW: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        """Return the normalized mean of the posterior, float32; nothing is sampled, as in the reference
        implementations."""
        latents_BCHW = self.encode_mean(vae, pixels_BCHW).float()
        mean, deviation = self.statistics(vae, latents_BCHW.device)
        return (latents_BCHW - mean) / deviation

    def normalize(self, latents_BCHW: Tensor) -> Tensor:
        return latents_BCHW

    def decode(self, vae: nn.Module, latents_BCHW: Tensor) -> Tensor:
        """Decode normalized latents to images, float32, about -1..1."""
        mean, deviation = self.statistics(vae, latents_BCHW.device)
        return self.decode_latents(vae, latents_BCHW.float() * deviation + mean).float()
