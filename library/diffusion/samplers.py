"""Samplers from noise to latents: diffusers' schedulers behind one interface.

Letters: B samples, C channels, H height, W width, T timesteps of the schedule, N noise levels of a sampling run.
"""

import inspect
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from math import sqrt
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from library.diffusion.noise import draw_normal
from library.diffusion.schedules import LATENT_DIFFUSION, BetaSchedule, sigmas_of
from library.diffusion.timesteps import NUM_TIMESTEPS, shift_sigmas
from library.options.output.sampler_names import ALIASES, SAMPLERS
from library.types import Prompt

Velocity = Literal["noise - latent", "latent - noise"]
"""A denoiser's sign convention of the velocity."""


class Level(NamedTuple):
    """The noise level of one call of the denoiser."""

    timestep: float  # 0..999, or 0..1000 for flow models
    sigma: float  # DDPM: sqrt((1 - abar) / abar); flow: the share of noise, 0..1


class Sampler(Protocol):
    """The sampler of one image. Build a new one for each image, because multi-step methods keep a history."""

    @property
    def levels(self) -> Sequence[Level]:
        """The noise level of each call of the denoiser; second-order methods make two calls per step."""
        ...

    def start(self, noise_BCHW: Tensor) -> Tensor:
        """Return the initial latents for noise of unit variance."""
        ...

    def denoiser_input(self, latents_BCHW: Tensor, index: int) -> Tensor:
        """Return the denoiser's input at level `index`."""
        ...

    def step(self, prediction_BCHW: Tensor, latents_BCHW: Tensor, index: int, generator: torch.Generator) -> Tensor:
        """Return the latents after level `index`, float32. Ancestral methods draw noise from `generator` (CPU)."""
        ...


# diffusers' value for an abar of 0, by which most methods would divide.
LEAST_ABAR = 2.0**-24
DDPM_SAMPLER = "ddpm"
"""The stochastic sampler of Ho et al. 2020, which adds noise in each step. Not a value of `sample_sampler`."""


def build_ddpm_sampler(
    name: str,
    num_steps: int,
    *,
    predicts_velocity: bool,
    zero_terminal_snr: bool,
    schedule: BetaSchedule = LATENT_DIFFUSION,
) -> Sampler:
    """Build the sampler `name` (a key of SAMPLERS or ALIASES, or DDPM_SAMPLER) for a DDPM model.

    A schedule with zero terminal SNR starts at the last timestep (Lin et al. 2024).
    """
    abar_T = schedule.abar(zero_terminal_snr)
    if name == DDPM_SAMPLER:
        return AncestralSampler(num_steps, predicts_velocity, zero_terminal_snr, abar_T)
    import diffusers

    name = ALIASES.get(name, name)
    class_name, keywords = SAMPLERS[name]
    scheduler_class = getattr(diffusers, class_name)
    settings: dict[str, Any] = {
        "num_train_timesteps": NUM_TIMESTEPS,
        "prediction_type": "v_prediction" if predicts_velocity else "epsilon",
    }
    if zero_terminal_snr:
        settings["trained_betas"] = betas_of(abar_T.clamp(min=LEAST_ABAR)).tolist()
        if "timestep_spacing" in inspect.signature(scheduler_class.__init__).parameters:
            settings["timestep_spacing"] = "trailing"
    else:
        settings |= asdict(schedule)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # "dpmsolver" is deprecated in diffusers
        scheduler = scheduler_class(**settings, **keywords)
    scheduler.set_timesteps(num_steps)
    return (MultistepSampler if name == "lms" else DdpmSampler)(scheduler, abar_T)


def betas_of(abar_T: Tensor) -> Tensor:
    """Return the betas for which `abar_T` is the running product of 1 - beta."""
    return 1 - abar_T / torch.cat([torch.ones(1, dtype=abar_T.dtype), abar_T[:-1]])


class DdpmSampler:
    """A diffusers scheduler for models that predict noise or velocity."""

    def __init__(self, scheduler: Any, abar_T: Tensor) -> None:
        """`abar_T` is the table of the schedule that the model was trained on, float64."""
        self.scheduler = scheduler
        sigmas_T = sigmas_of(abar_T).numpy()
        timesteps_N = scheduler.timesteps.double().numpy()
        # Timesteps of some schedulers lie between those of the table.
        sigmas_N = np.interp(timesteps_N, np.arange(len(sigmas_T)), sigmas_T)
        self.levels = [Level(float(t), float(sigma)) for t, sigma in zip(timesteps_N, sigmas_N, strict=True)]
        self._takes_generator = "generator" in inspect.signature(scheduler.step).parameters

    def start(self, noise_BCHW: Tensor) -> Tensor:
        return noise_BCHW * float(self.scheduler.init_noise_sigma)

    def denoiser_input(self, latents_BCHW: Tensor, index: int) -> Tensor:
        scaled: Tensor = self.scheduler.scale_model_input(latents_BCHW, self.scheduler.timesteps[index])
        return scaled

    def step(self, prediction_BCHW: Tensor, latents_BCHW: Tensor, index: int, generator: torch.Generator) -> Tensor:
        keywords = {"generator": generator} if self._takes_generator else {}
        timestep = self.scheduler.timesteps[index]
        stepped: Tensor = self.scheduler.step(prediction_BCHW, timestep, latents_BCHW, **keywords).prev_sample
        return stepped.float()


class MultistepSampler(DdpmSampler):
    """The linear multistep method of k-diffusion: Adams-Bashforth of order 4 on the scheduler's own noise levels.

    Replaces diffusers' version, which integrates a cubic polynomial numerically and requires scipy.
    """

    def __init__(self, scheduler: Any, abar_T: Tensor, order: int = 4) -> None:
        super().__init__(scheduler, abar_T)
        self._order = order
        self._slopes: list[Tensor] = []

    def step(self, prediction_BCHW: Tensor, latents_BCHW: Tensor, index: int, generator: torch.Generator) -> Tensor:
        sigmas = self.scheduler.sigmas.double().numpy()
        stepped = super().step(prediction_BCHW, latents_BCHW, index, generator)  # Euler: latents + width * slope
        slope_BCHW = (stepped - latents_BCHW) / (sigmas[index + 1] - sigmas[index])
        self._slopes = [slope_BCHW, *self._slopes][: self._order]
        weights = adams_bashforth(sigmas, index, len(self._slopes))
        terms = [float(weight) * slope for weight, slope in zip(weights, self._slopes, strict=True)]
        return latents_BCHW + torch.stack(terms).sum(0)


class AncestralSampler:
    """The stochastic DDPM sampler, which draws from the posterior of the next less noisy latents (Ho et al. 2020,
    algorithm 2).

    Replaces diffusers' version, whose host waits for the GPU in each step when it moves the noise there. Training runs
    many such steps.
    """

    def __init__(self, num_steps: int, predicts_velocity: bool, zero_terminal_snr: bool, abar_T: Tensor) -> None:
        spacing = NUM_TIMESTEPS // num_steps
        # diffusers' spacings: "leading", and "trailing" for a schedule that has to start at its last timestep.
        timesteps = [spacing * n for n in reversed(range(num_steps))]
        if zero_terminal_snr:
            timesteps = [round(NUM_TIMESTEPS - NUM_TIMESTEPS * n / num_steps) - 1 for n in range(num_steps)]
        abars: list[float] = abar_T.clamp(min=LEAST_ABAR)[timesteps].tolist()
        self._predicts_velocity, self._abars = predicts_velocity, [*abars, 1.0]
        self.levels = [Level(float(t), sqrt((1 - abar) / abar)) for t, abar in zip(timesteps, abars, strict=True)]

    def start(self, noise_BCHW: Tensor) -> Tensor:
        return noise_BCHW

    def denoiser_input(self, latents_BCHW: Tensor, index: int) -> Tensor:
        return latents_BCHW

    def step(self, prediction_BCHW: Tensor, latents_BCHW: Tensor, index: int, generator: torch.Generator) -> Tensor:
        abar, abar_below = self._abars[index : index + 2]
        alpha = abar / abar_below
        if self._predicts_velocity:
            clean_BCHW = sqrt(abar) * latents_BCHW - sqrt(1 - abar) * prediction_BCHW
        else:
            clean_BCHW = (latents_BCHW - sqrt(1 - abar) * prediction_BCHW) / sqrt(abar)
        weight_clean = sqrt(abar_below) * (1 - alpha) / (1 - abar)
        weight_latents = sqrt(alpha) * (1 - abar_below) / (1 - abar)
        mean_BCHW = weight_clean * clean_BCHW + weight_latents * latents_BCHW
        if index == len(self.levels) - 1:
            return mean_BCHW
        deviation = sqrt((1 - alpha) * (1 - abar_below) / (1 - abar))
        return mean_BCHW + deviation * draw_normal(tuple(mean_BCHW.shape), generator, mean_BCHW.device)


def adams_bashforth(positions: Any, index: int, order: int) -> list[float]:
    """Return the weights of the last `order` slopes, newest first, for the step from position `index` to the next.

    Each weight is the integral of a Lagrange basis polynomial over the step.
    """
    # Positions count from the current one, where the antiderivatives are 0.
    origin = positions[index]
    nodes = [positions[index - back] - origin for back in range(order)]
    end = positions[index + 1] - origin
    weights = []
    for j, node in enumerate(nodes):
        others = [other for k, other in enumerate(nodes) if k != j]
        basis = np.atleast_1d(np.poly(others)) / np.prod([node - other for other in others])
        weights.append(float(np.polyval(np.polyint(basis), end)))
    return weights


class FlowSampler:
    """Euler steps of a flow model along `sigmas_N`, decreasing shares of noise. The last step ends at 0.

    `predicts` is the denoiser's sign convention of the velocity.
    """

    def __init__(self, sigmas_N: Tensor, predicts: Velocity = "noise - latent") -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        # The noise levels are shifted already, and the scheduler would shift them again.
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TIMESTEPS, shift=1.0)
        self.scheduler.set_timesteps(sigmas=sigmas_N.double().tolist())
        self.levels = [Level(sigma * NUM_TIMESTEPS, sigma) for sigma in sigmas_N.double().tolist()]
        self.points_to_noise = predicts == "noise - latent"

    def start(self, noise_BCHW: Tensor) -> Tensor:
        return noise_BCHW

    def denoiser_input(self, latents_BCHW: Tensor, index: int) -> Tensor:
        return latents_BCHW

    def step(self, prediction_BCHW: Tensor, latents_BCHW: Tensor, index: int, generator: torch.Generator) -> Tensor:
        timestep = self.scheduler.timesteps[index]
        if not self.points_to_noise:
            prediction_BCHW = -prediction_BCHW
        stepped: Tensor = self.scheduler.step(prediction_BCHW, timestep, latents_BCHW, generator=generator).prev_sample
        return stepped.float()


def even_sigmas(num_steps: int) -> Tensor:
    """Return shares of noise from 1 down to 1 / num_steps in equal steps, float64, shape N."""
    return torch.linspace(1.0, 1.0 / num_steps, num_steps, dtype=torch.float64)


def build_shifted_sampler(prompt: Prompt, predicts: Velocity = "noise - latent") -> FlowSampler:
    """Build an Euler sampler on evenly spaced noise levels, shifted toward noise by the prompt's --fs."""
    assert prompt.flow_shift is not None
    return FlowSampler(shift_sigmas(even_sigmas(prompt.num_steps), prompt.flow_shift), predicts)
