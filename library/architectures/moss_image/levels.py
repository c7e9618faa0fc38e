"""The noise levels of MOSS-Image in training and in previews.

Letters: B samples, N levels of a sampling run, x a logit-normal value, z a normal one, u a uniform one.
"""

import math

import torch
from torch import Tensor

from library.diffusion.samplers import FlowSampler, Sampler
from library.diffusion.timesteps import NUM_TIMESTEPS, SMALLEST_DRAW, LevelDraws, shift_sigmas
from library.types import Prompt

MEAN, DEVIATION = 1.09, 0.95  # of z, where x = sigmoid(MEAN + DEVIATION z)
LARGEST = 0.95  # x above this is not drawn, and the rest is stretched to 1
UNIFORM_SHARE = 0.01  # of the levels, drawn uniformly instead
LARGEST_QUANTILE = 0.5 * (1 + math.erf((math.log(LARGEST / (1 - LARGEST)) - MEAN) / DEVIATION / math.sqrt(2)))


def draw_levels(draws: LevelDraws) -> Tensor:
    """Draw noise levels as the model was trained, whole thousandths, float32, shape B. Offsets are not supported."""
    u_B = draws.uniform()
    rest_B = (u_B - UNIFORM_SHARE) / (1 - UNIFORM_SHARE)
    z_B = torch.special.ndtri((rest_B * LARGEST_QUANTILE).clamp(min=SMALLEST_DRAW))
    logit_normal_B = torch.sigmoid(MEAN + DEVIATION * z_B) / LARGEST
    return round_levels(torch.where(u_B < UNIFORM_SHARE, u_B / UNIFORM_SHARE, logit_normal_B))


def round_levels(sigmas_B: Tensor) -> Tensor:
    """Move levels to the nearest of those that the model was trained on: 0.001, 0.002, ..., 1."""
    return (sigmas_B * NUM_TIMESTEPS).round().clamp(1, NUM_TIMESTEPS) / NUM_TIMESTEPS


def preview_sampler(prompt: Prompt) -> Sampler:
    """Build an Euler sampler on levels shifted by --fs, without those that round to the same one."""
    assert prompt.flow_shift is not None
    # The model's own pipeline takes its last level from a table that is shifted already, and shifts it again.
    last = prompt.flow_shift / (NUM_TIMESTEPS - 1 + prompt.flow_shift)
    sigmas_N = torch.linspace(1.0, last, prompt.num_steps, dtype=torch.float64)
    levels = round_levels(shift_sigmas(sigmas_N, prompt.flow_shift)).tolist()
    return FlowSampler(torch.tensor(list(dict.fromkeys(levels)), dtype=torch.float64))
