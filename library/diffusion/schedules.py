"""The noise schedule of the DDPM models over 1000 timesteps.

Letters: T timesteps. abar is the paper's running product of 1 - beta (Ho et al. 2020): the noisy latent is sqrt(abar) *
latent + sqrt(1 - abar) * noise. Tables are float64 on the CPU; callers cast the looked-up values.
"""

import torch
from torch import Tensor

from library.diffusion.timesteps import NUM_TIMESTEPS

BETA_START = 0.00085
BETA_END = 0.012


def scaled_linear_betas() -> Tensor:
    """Return the betas of latent diffusion (Rombach et al. 2022): float64, shape T; their square roots are linear."""
    # In float32, 1 - abar of the first timesteps would have only four correct digits.
    return torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2


def abar_of(betas_T: Tensor) -> Tensor:
    """Return the running product of 1 - beta, shape T."""
    return torch.cumprod(1 - betas_T, 0)


def with_zero_terminal_snr(abar_T: Tensor) -> Tensor:
    """Shift and scale sqrt(abar): the last value becomes 0, the first is kept (Lin et al. 2024, algorithm 1)."""
    root_T = abar_T.sqrt()
    first, last = root_T[0], root_T[-1]
    return ((root_T - last) * first / (first - last)) ** 2


def ddpm_abar(zero_terminal_snr: bool) -> Tensor:
    """Return the abar table for training and sampling DDPM models, float64, shape T."""
    abar_T = abar_of(scaled_linear_betas())
    return with_zero_terminal_snr(abar_T) if zero_terminal_snr else abar_T


def snr_of(abar_T: Tensor) -> Tensor:
    """Return the signal-to-noise ratio, abar / (1 - abar)."""
    return abar_T / (1 - abar_T)


def sigmas_of(abar_T: Tensor) -> Tensor:
    """Return the ratio of noise to signal, sqrt((1 - abar) / abar); infinite where no signal is left."""
    return ((1 - abar_T) / abar_T).sqrt()
