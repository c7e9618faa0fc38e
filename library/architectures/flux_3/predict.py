"""Prediction by the denoiser of FLUX.3 Image Klein."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from library.diffusion.references import references_in
from library.diffusion.samplers import Level
from library.memory.devices import send
from library.types import Batch, Conditioning, Noised

SMALLEST_STEP = 1e-6  # between noise levels; sampling in 1000 steps has 1e-4


def predict(
    denoiser: nn.Module, noised: Noised, conditioning: Conditioning, batch: Batch, *, levels: Sequence[Level] = ()
) -> Tensor:
    """Return the velocity, noise - latent, in the shape of the latents.

    A distilled model also takes the noise level that a step ends at: the next one of `levels`, those of a sampler, or
    without any, as in training, the sample's own.
    """
    velocity_BCHW: Tensor = denoiser(
        noised.latents_BCHW,
        noised.sigmas_B,
        conditioning["hidden_state"],
        conditioning["attention_mask"],
        references_in(conditioning),
        next_sigmas(noised.sigmas_B, levels) if levels else None,
    )
    return velocity_BCHW


def next_sigmas(sigmas_B: Tensor, levels: Sequence[Level]) -> Tensor:
    """Return the largest share of noise among `levels` below each of `sigmas_B`; 0 below the last."""
    levels_N = send(torch.tensor([level.sigma for level in levels], dtype=torch.float32), sigmas_B.device)
    return torch.where(levels_N < sigmas_B[:, None] - SMALLEST_STEP, levels_N, 0).amax(1)
