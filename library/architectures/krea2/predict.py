"""Prediction by the denoiser of Krea 2, and its preview sampler."""

import math

from library.diffusion.samplers import FlowSampler, Sampler, even_sigmas
from library.diffusion.timesteps import KREA2_SHIFT_ENDS, resolution_shift, shift_sigmas
from library.models.prediction import build_predict
from library.models.vae.qwen_image import DOWNSCALE
from library.types import Prompt

TURBO_SHIFT = math.exp(1.15)  # at every size
predict = build_predict("hidden_state", "attention_mask", has_references=True)


def preview_sampler(prompt: Prompt, is_turbo: bool) -> Sampler:
    """Build a sampler on even noise levels, shifted toward noise by the image size, or for Turbo by a constant."""
    shift = TURBO_SHIFT
    if not is_turbo:
        shift = resolution_shift(prompt.height // DOWNSCALE, prompt.width // DOWNSCALE, KREA2_SHIFT_ENDS)
    return FlowSampler(shift_sigmas(even_sigmas(prompt.num_steps), shift))
