"""Prediction by the denoiser of Krea 2, and its preview sampler."""

import math

from torch import Tensor, nn

from library.diffusion.references import references_in
from library.diffusion.samplers import FlowSampler, Sampler, even_sigmas
from library.diffusion.timesteps import KREA2_SHIFT_ENDS, resolution_shift, shift_sigmas
from library.models.vae.qwen_image import DOWNSCALE
from library.types import Batch, Conditioning, Noised, Prompt

TURBO_SHIFT = math.exp(1.15)  # at every size


def predict(denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch) -> Tensor:
    """Return the velocity, noise - latent, in the shape of the latents."""
    velocity_BCHW: Tensor = denoiser(
        noised.latents_BCHW,
        noised.sigmas_B,
        conditioning["hidden_state"],
        conditioning["attention_mask"],
        references_in(conditioning),
    )
    return velocity_BCHW


def preview_sampler(prompt: Prompt, is_turbo: bool) -> Sampler:
    """Build a sampler on even noise levels, shifted toward noise by the image size, or for Turbo by a constant."""
    shift = TURBO_SHIFT
    if not is_turbo:
        shift = resolution_shift(prompt.height // DOWNSCALE, prompt.width // DOWNSCALE, KREA2_SHIFT_ENDS)
    return FlowSampler(shift_sigmas(even_sigmas(prompt.num_steps), shift))
