"""What the denoiser learns: DDPM's noise or velocity prediction.

Letters: B samples, C channels, H height, W width, T timesteps of the schedule.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from library.diffusion.noise import add_coarse_noise, add_offset, draw_normal, draw_strength
from library.diffusion.schedules import NUM_TIMESTEPS, ddpm_abar, sigmas_of, snr_of
from library.diffusion.timesteps import check_timestep_range, draw_timesteps
from library.diffusion.weighting import check_huber, huber_threshold, pointwise_error, snr_weights
from library.memory.devices import send
from library.options.training.loss import LossOptions
from library.options.training.noise import NoiseOptions
from library.types import Noised

TABLES = ("signal", "noise", "sigmas", "weights")


@dataclass(frozen=True, eq=False)
class DDPM:
    """Predict the noise, or the velocity (Salimans and Ho 2022), at one of 1000 discrete noise levels.

    `corrupt` draws from its generator in this order, and only what is switched on: noise; strength and values of the
    noise offset; for each multires pass its shrink factor and its noise (so far `draw_noise` draws too); timesteps;
    strength and values of the extra input noise. Strengths are one number for the batch.
    """

    abar_T: Tensor  # float64, what latents are noised with
    snr_T: Tensor  # float64, what weights are computed from
    predicts_velocity: bool
    min_timestep: int
    max_timestep: int
    noise: NoiseOptions
    weighting: LossOptions
    tables: Mapping[str, Tensor] = field(default_factory=dict)  # those that are there already, see `on`

    @property
    def takes_offset(self) -> bool:
        """Timesteps are drawn evenly, with no normal value behind them."""
        return False

    def corrupt(self, clean_BCHW: Tensor, generator: torch.Generator, offsets_B: Tensor | None = None) -> Noised:
        """Noise latents to levels of their own; tensors in the latents' dtype and device, arithmetic in float32.

        Offsets move nothing.
        """
        o = self.noise
        clean = clean_BCHW.float()
        noise_BCHW = self.draw_noise(clean, generator)
        drawn_B = draw_timesteps(
            len(clean), self.min_timestep, self.max_timestep, generator, num_timesteps=len(self.abar_T)
        )
        timesteps_B = send(drawn_B, clean.device)
        input_noise_BCHW = noise_BCHW
        if o.ip_noise_gamma:
            gamma = draw_strength(o.ip_noise_gamma, o.ip_noise_gamma_random_strength, generator)
            input_noise_BCHW = noise_BCHW + gamma * draw_normal(clean.shape, generator, clean.device)
        signal_B111, noise_B111 = self._scales(timesteps_B)
        return Noised(
            latents_BCHW=(signal_B111 * clean + noise_B111 * input_noise_BCHW).to(clean_BCHW.dtype),
            clean_BCHW=clean_BCHW,
            noise_BCHW=noise_BCHW.to(clean_BCHW.dtype),
            sigmas_B=self._look_up("sigmas", timesteps_B),
            timesteps_B=timesteps_B,
        )

    def draw_noise(self, clean_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        """The noise for latents, float32, with the offset and the coarse noise that are asked for."""
        o, clean = self.noise, clean_BCHW.float()
        noise_BCHW = draw_normal(clean.shape, generator, clean.device)
        if o.noise_offset:
            strength = draw_strength(o.noise_offset, o.noise_offset_random_strength, generator)
            noise_BCHW = add_offset(noise_BCHW, clean, strength, o.adaptive_noise_scale, generator)
        if o.multires_noise_iterations:
            noise_BCHW = add_coarse_noise(noise_BCHW, o.multires_noise_iterations, o.multires_noise_discount, generator)
        return noise_BCHW

    def noise_levels(self, noised: Noised) -> Tensor:
        """The timestep as a share of all, 0 to 0.999."""
        return noised.timesteps_B.float() / len(self.abar_T)

    def estimate(self, output_BCHW: Tensor, noised: Noised) -> Tensor:
        """The denoiser's output as it is: it says noise, or velocity, in the terms of the target."""
        return output_BCHW

    def target(self, noised: Noised) -> Tensor:
        """What the denoiser should say, float32: the noise, or sqrt(abar) * noise - sqrt(1 - abar) * latent."""
        if not self.predicts_velocity:
            return noised.noise_BCHW.float()
        signal_B111, noise_B111 = self._scales(noised.timesteps_B)
        return signal_B111 * noised.noise_BCHW.float() - noise_B111 * noised.clean_BCHW.float()

    def loss(self, prediction_BCHW: Tensor, target_BCHW: Tensor, noised: Noised) -> Tensor:
        """The error of every latent value times the weight of its noise level, float32, shape BCHW."""
        threshold_B = None
        if self.weighting.loss_type in ("huber", "smooth_l1"):
            threshold_B = huber_threshold(self.weighting, noised.sigmas_B, noised.timesteps_B, len(self.abar_T))
        error_BCHW = pointwise_error(prediction_BCHW, target_BCHW, self.weighting.loss_type, threshold_B)
        return error_BCHW * self._look_up("weights", noised.timesteps_B).view(-1, 1, 1, 1)

    def on(self, device: torch.device) -> "DDPM":
        """The same with its tables on the device."""
        return replace(self, tables={name: send(self._table(name), device) for name in TABLES})

    def at_timestep(self, timestep: int) -> "DDPM":
        """The same objective at one noise level, for validation."""
        return replace(self, min_timestep=timestep, max_timestep=timestep)

    def _scales(self, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar) and sqrt(1 - abar), float32, shape B111."""
        signal_B, noise_B = (self._look_up(name, timesteps_B) for name in ("signal", "noise"))
        return signal_B.view(-1, 1, 1, 1), noise_B.view(-1, 1, 1, 1)

    def _look_up(self, name: str, timesteps_B: Tensor) -> Tensor:
        """A table's values at the timesteps, on their device; the table moves, so that no card is waited for.

        Timesteps of a sampler are floats.
        """
        table_T = self.tables[name] if name in self.tables else self._table(name)
        return send(table_T, timesteps_B.device)[timesteps_B.long()]

    def _table(self, name: str) -> Tensor:
        """A value for each timestep, float32, computed in float64."""
        if name == "signal":
            return self.abar_T.sqrt().float()
        if name == "noise":
            return (1 - self.abar_T).sqrt().float()
        if name == "sigmas":
            return sigmas_of(self.abar_T).float()
        return snr_weights(self.weighting, self.snr_T, self.predicts_velocity).float()


def build_ddpm(noise: NoiseOptions, weighting: LossOptions, predicts_velocity: bool) -> DDPM:
    """Build the objective of the models that learned on `ddpm_abar`.

    Weights use the signal-to-noise ratios of the unchanged schedule even with zero terminal SNR: the changed one ends
    at 0, where min-SNR and debiased weights would be 0 / 0 and 1 / 0.
    Raises UserError for timesteps outside the schedule and for thresholds that make no loss.
    """
    min_timestep = 0 if noise.min_timestep is None else noise.min_timestep
    max_timestep = NUM_TIMESTEPS if noise.max_timestep is None else noise.max_timestep
    check_timestep_range(min_timestep, max_timestep, NUM_TIMESTEPS)
    if weighting.loss_type in ("huber", "smooth_l1"):
        check_huber(weighting)
    return DDPM(
        abar_T=ddpm_abar(noise.zero_terminal_snr),
        snr_T=snr_of(ddpm_abar(zero_terminal_snr=False)),
        predicts_velocity=predicts_velocity,
        min_timestep=min_timestep,
        max_timestep=max_timestep,
        noise=noise,
        weighting=weighting,
    )
