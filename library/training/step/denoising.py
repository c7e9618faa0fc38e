"""The way from noise to latents: previews go all of it, concepts a part."""

from collections.abc import Callable

import torch
from torch import Tensor

from library.diffusion.samplers import Level, Sampler
from library.types import Noised

Say = Callable[[Noised, float], Tensor]
"""(latents at a level, the share of the way done after it) -> what the denoiser says of them, float32 and guided."""


def denoise(
    sampler: Sampler,
    say: Say,
    latents_BCHW: Tensor,
    generator: torch.Generator,
    num_calls: int | None = None,
    goes_on: Callable[[], bool] = lambda: True,
) -> Tensor | None:
    """Take latents as `sampler.start` gives them past its first `num_calls` levels, or all.

    `goes_on` is asked after each; None where it broke off. Samplers that add noise draw it from `generator`.
    """
    for n, level in enumerate(sampler.levels[:num_calls]):
        noised = noised_at(level, sampler.denoiser_input(latents_BCHW, n))
        prediction_BCHW = say(noised, (n + 1) / len(sampler.levels))
        latents_BCHW = sampler.step(prediction_BCHW, latents_BCHW, n, generator)
        if not goes_on():
            return None
    return latents_BCHW


def noised_at(level: Level, latents_BCHW: Tensor) -> Noised:
    """Return the latents as the denoiser gets them; what is unknown while sampling, clean latents and noise, is NaN."""
    unknown_BCHW = torch.full_like(latents_BCHW, torch.nan)
    sigma_B, timestep_B = (
        torch.full((len(latents_BCHW),), value, device=latents_BCHW.device) for value in (level.sigma, level.timestep)
    )
    return Noised(latents_BCHW, unknown_BCHW, unknown_BCHW, sigma_B, timestep_B)
