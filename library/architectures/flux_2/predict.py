"""Prediction by the denoiser of FLUX.2, and its preview sampler."""

import math

import torch
from torch import Tensor, nn

from library.diffusion.references import references_in
from library.diffusion.samplers import FlowSampler, Sampler, even_sigmas
from library.diffusion.timesteps import shift_sigmas
from library.types import Batch, Conditioning, Noised, Prompt

PIXELS_PER_TOKEN = 16
# The reference implementation fits m linearly to the number of tokens, once for 10 and once for 200 steps, and
# interpolates between the two for other numbers of steps. Above 4300 tokens only the fit for 200 steps is used. See
# sampling.py in https://github.com/black-forest-labs/flux2.
FEW_STEPS, FEW_SLOPE, FEW_START = 10, 8.73809524e-05, 1.89833333
MANY_STEPS, MANY_SLOPE, MANY_START = 200, 0.00016927, 0.45666666
MAX_TOKENS = 4300
TRAINING_GUIDANCE = 1.0  # as in musubi-tuner


def predict(
    denoiser: nn.Module,
    noised: Noised,
    conditioning: Conditioning,
    batch: Batch,
    *,
    guidance: float = TRAINING_GUIDANCE,
) -> Tensor:
    """Return the velocity, noise - latent, in the shape of the latents. `guidance` is dev's input; klein has none."""
    velocity_BCHW: Tensor = denoiser(
        noised.latents_BCHW,
        noised.sigmas_B,
        conditioning["hidden_state"],
        torch.full_like(noised.sigmas_B, guidance),
        references_in(conditioning),
    )
    return velocity_BCHW


def sampling_shift(num_tokens: int, num_steps: int) -> float:
    """Return the shift e^m of a preview's noise levels."""
    many = MANY_SLOPE * num_tokens + MANY_START
    if num_tokens > MAX_TOKENS:
        return math.exp(many)
    few = FEW_SLOPE * num_tokens + FEW_START
    share = (num_steps - FEW_STEPS) / (MANY_STEPS - FEW_STEPS)
    return math.exp(few + share * (many - few))


def preview_sampler(prompt: Prompt) -> Sampler:
    """Build a sampler on even noise levels, shifted toward noise by the image size and the number of steps."""
    num_tokens = (prompt.height // PIXELS_PER_TOKEN) * (prompt.width // PIXELS_PER_TOKEN)
    sigmas_N = even_sigmas(prompt.num_steps)
    return FlowSampler(shift_sigmas(sigmas_N, sampling_shift(num_tokens, prompt.num_steps)))
