"""Noise for latents: white, with an offset, or multi-resolution.

Letters: B samples, C channels, H height, W width. All random numbers come from the given CPU generator, so that they do
not depend on the GPU. Results are float32, on the device of the input tensors.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from library.memory.devices import send
from library.options.training.noise import NoiseOptions


def draw_normal(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw white noise, float32."""
    return send(torch.randn(shape, generator=generator), device)


def draw_strength(strength: float, is_random: bool, generator: torch.Generator) -> float:
    """Return `strength`, or if random a uniform value between 0 and `strength`. A fixed strength draws nothing."""
    return strength * torch.rand((), generator=generator).item() if is_random else strength


def perturb_input(noise_BCHW: Tensor, options: NoiseOptions, generator: torch.Generator) -> Tensor:
    """Return the noise of the denoiser's input: plus white noise times --ip_noise_gamma, if that is set.

    The target keeps the plain noise (Ning et al. 2023, arXiv:2301.11706).
    """
    if not options.ip_noise_gamma:
        return noise_BCHW
    gamma = draw_strength(options.ip_noise_gamma, options.ip_noise_gamma_random_strength, generator)
    return noise_BCHW + gamma * draw_normal(tuple(noise_BCHW.shape), generator, noise_BCHW.device)


def add_offset(
    noise_BCHW: Tensor, clean_BCHW: Tensor, strength: float, adaptive_scale: float | None, generator: torch.Generator
) -> Tensor:
    """Shift each channel of each sample by one random value, so that the model learns the brightness of whole images.

    The shift is `strength` times a normal value. `adaptive_scale` times the absolute mean of a channel's clean latent
    is added to its strength, which never falls below 0. Source: crosslabs.org, "Diffusion with offset noise".
    """
    B, C = noise_BCHW.shape[:2]
    strength_BC11 = torch.full((B, C, 1, 1), strength, device=noise_BCHW.device)
    if adaptive_scale:
        means_BC11 = clean_BCHW.float().mean((2, 3), keepdim=True)
        strength_BC11 = (strength_BC11 + adaptive_scale * means_BC11.abs()).clamp(min=0)
    return noise_BCHW + strength_BC11 * draw_normal((B, C, 1, 1), generator, noise_BCHW.device)


def add_coarse_noise(noise_BCHW: Tensor, num_iterations: int, discount: float, generator: torch.Generator) -> Tensor:
    """Add increasingly coarse noise ("multi-resolution noise"), then rescale each sample to unit standard deviation.

    Pass i adds discount**i times white noise at 1 / r**i of the size, resized bilinearly; r is drawn uniformly from [2,
    4) for each pass. The passes end early once a side has one value. Source: Jonathan Whitaker, "Multi-resolution
    noise for diffusion model training".
    """
    B, C, H, W = noise_BCHW.shape
    for i in range(num_iterations):
        shrink = (2 + 2 * torch.rand((), generator=generator).item()) ** i
        h, w = max(1, int(H / shrink)), max(1, int(W / shrink))
        coarse_BChw = draw_normal((B, C, h, w), generator, noise_BCHW.device)
        noise_BCHW = noise_BCHW + discount**i * interpolate(coarse_BChw, (H, W), mode="bilinear")
        if h == 1 or w == 1:
            break
    # Per sample, so that an image's noise does not depend on the rest of its batch.
    return noise_BCHW / noise_BCHW.std((1, 2, 3), keepdim=True)
