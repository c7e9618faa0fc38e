"""Denoising from noise to latents: previews run all steps, concepts stop early."""

from collections.abc import Callable

import torch
from torch import Tensor

from library.diffusion.samplers import Level, Sampler
from library.types import Noised

Predict = Callable[[Noised, float], Tensor]
"""(latents with noise, progress after this step from 0 to 1) -> the guided prediction, float32."""


def denoise(
    sampler: Sampler,
    predict: Predict,
    latents_BCHW: Tensor,
    generator: torch.Generator,
    num_calls: int | None = None,
    goes_on: Callable[[], bool] = lambda: True,
) -> Tensor | None:
    """Denoise latents that `sampler.start` returned through the first `num_calls` noise levels, or through all.

    `goes_on` is called after each step; if it returns False the result is None. Samplers that add noise draw it from
    `generator`.
    """
    for n, level in enumerate(sampler.levels[:num_calls]):
        noised = add_noise_at(level, sampler.denoiser_input(latents_BCHW, n))
        prediction_BCHW = predict(noised, (n + 1) / len(sampler.levels))
        latents_BCHW = sampler.step(prediction_BCHW, latents_BCHW, n, generator)
        if not goes_on():
            return None
    return latents_BCHW


def add_noise_at(level: Level, latents_BCHW: Tensor) -> Noised:
    """Wrap latents at a noise level for the denoiser; clean latents and noise are unknown while sampling and set to
    NaN."""
    unknown_BCHW = torch.full_like(latents_BCHW, torch.nan)
    sigma_B, timestep_B = (
        torch.full((len(latents_BCHW),), value, device=latents_BCHW.device) for value in (level.sigma, level.timestep)
    )
    return Noised(latents_BCHW, unknown_BCHW, unknown_BCHW, sigma_B, timestep_B)
