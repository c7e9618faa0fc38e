"""The noise schedule of the DDPM models over 1000 timesteps.

Letters: T timesteps. abar is the paper's running product of 1 - beta (Ho et al. 2020): the noisy latent is sqrt(abar) *
latent + sqrt(1 - abar) * noise. Tables are float64 on the CPU; callers cast the looked-up values.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from library.diffusion.timesteps import NUM_TIMESTEPS


@dataclass(frozen=True)
class BetaSchedule:
    """The noise schedule of a DDPM model, by the names that diffusers' schedulers have for its values."""

    beta_start: float
    beta_end: float
    beta_schedule: Literal["linear", "scaled_linear"]  # the betas, or their square roots, are linear

    def betas(self) -> Tensor:
        """Return the betas: float64, shape T."""
        # In float32, 1 - abar of the first timesteps would have only four correct digits.
        power = 2 if self.beta_schedule == "scaled_linear" else 1
        start, end = self.beta_start ** (1 / power), self.beta_end ** (1 / power)
        return torch.linspace(start, end, NUM_TIMESTEPS, dtype=torch.float64) ** power

    def abar(self, zero_terminal_snr: bool) -> Tensor:
        """Return the table for training and sampling: float64, shape T."""
        abar_T = abar_of(self.betas())
        return with_zero_terminal_snr(abar_T) if zero_terminal_snr else abar_T


LATENT_DIFFUSION = BetaSchedule(0.00085, 0.012, "scaled_linear")
"""The schedule of latent diffusion (Rombach et al. 2022)."""


def abar_of(betas_T: Tensor) -> Tensor:
    """Return the running product of 1 - beta, shape T."""
    return torch.cumprod(1 - betas_T, 0)


def with_zero_terminal_snr(abar_T: Tensor) -> Tensor:
    """Shift and scale sqrt(abar): the last value becomes 0, the first is kept (Lin et al. 2024, algorithm 1)."""
    root_T = abar_T.sqrt()
    first, last = root_T[0], root_T[-1]
    return ((root_T - last) * first / (first - last)) ** 2


def snr_of(abar_T: Tensor) -> Tensor:
    """Return the signal-to-noise ratio, abar / (1 - abar)."""
    return abar_T / (1 - abar_T)


def sigmas_of(abar_T: Tensor) -> Tensor:
    """Return the ratio of noise to signal, sqrt((1 - abar) / abar); infinite where no signal is left."""
    return ((1 - abar_T) / abar_T).sqrt()
