"""The DDPM objective: noise or velocity prediction.

Letters: B samples, C channels, H height, W width, T timesteps of the schedule.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from library.diffusion.noise import add_coarse_noise, add_offset, draw_normal, draw_strength, perturb_input
from library.diffusion.schedules import LATENT_DIFFUSION, BetaSchedule, sigmas_of, snr_of
from library.diffusion.timesteps import NUM_TIMESTEPS, draw_timesteps, resolve_timestep_range
from library.diffusion.weighting import check_huber, huber_threshold, pointwise_error, snr_weights
from library.memory.devices import send
from library.options.training.loss import LossOptions
from library.options.training.noise import NoiseOptions
from library.types import Noised

TABLES = ("signal", "noise", "sigmas", "weights")


@dataclass(frozen=True, eq=False)
class DDPM:
    """The objective of predicting the noise or the velocity (Salimans and Ho 2022) at one of 1000 discrete noise
    levels.

    `corrupt` draws from its generator in this order, skipping what is disabled: noise; strength and values of the noise
    offset; for each multires pass its shrink factor and its noise (`draw_noise` draws up to here); timesteps; strength
    and values of the extra input noise. Strengths are one number for the batch.
    """

    abar_T: Tensor  # float64, scales latents and noise
    snr_T: Tensor  # float64, determines loss weights
    predicts_velocity: bool
    min_timestep: int
    max_timestep: int
    noise: NoiseOptions
    weighting: LossOptions
    tables: Mapping[str, Tensor] = field(default_factory=dict)  # tables that are already on the device, see `on`

    @property
    def takes_offset(self) -> bool:
        """False: timesteps are drawn uniformly, not from a normal value that an offset could shift."""
        return False

    @property
    def num_strata(self) -> int:
        """1: timesteps are drawn independently."""
        return 1

    def corrupt(
        self,
        clean_BCHW: Tensor,
        generator: torch.Generator,
        offsets_B: Tensor | None = None,
        uniforms_B: Tensor | None = None,
    ) -> Noised:
        """Add noise at a timestep drawn for each sample. Tensors keep the latents' dtype and device; the arithmetic is
        float32.

        Offsets and given draws are ignored.
        """
        clean = clean_BCHW.float()
        noise_BCHW = self.draw_noise(clean, generator)
        cpu_timesteps_B = draw_timesteps(
            len(clean), self.min_timestep, self.max_timestep, generator, num_timesteps=len(self.abar_T)
        )
        timesteps_B = send(cpu_timesteps_B, clean.device)
        input_noise_BCHW = perturb_input(noise_BCHW, self.noise, generator)
        signal_B111, noise_B111 = self._scales(timesteps_B)
        return Noised(
            latents_BCHW=(signal_B111 * clean + noise_B111 * input_noise_BCHW).to(clean_BCHW.dtype),
            clean_BCHW=clean_BCHW,
            noise_BCHW=noise_BCHW.to(clean_BCHW.dtype),
            sigmas_B=self._look_up("sigmas", timesteps_B),
            timesteps_B=timesteps_B,
        )

    def draw_noise(self, clean_BCHW: Tensor, generator: torch.Generator) -> Tensor:
        """Draw noise for latents, float32, with the requested noise offset and multi-resolution noise."""
        options, clean = self.noise, clean_BCHW.float()
        noise_BCHW = draw_normal(clean.shape, generator, clean.device)
        if options.noise_offset:
            strength = draw_strength(options.noise_offset, options.noise_offset_random_strength, generator)
            noise_BCHW = add_offset(noise_BCHW, clean, strength, options.adaptive_noise_scale, generator)
        if options.multires_noise_iterations:
            noise_BCHW = add_coarse_noise(
                noise_BCHW, options.multires_noise_iterations, options.multires_noise_discount, generator
            )
        return noise_BCHW

    def noise_levels(self, noised: Noised) -> Tensor:
        """Return the timesteps as shares of the schedule's length, 0 to 0.999."""
        return noised.timesteps_B.float() / len(self.abar_T)

    def estimate(self, output_BCHW: Tensor, noised: Noised) -> Tensor:
        """Return the output unchanged: the denoiser predicts the target itself."""
        return output_BCHW

    def target(self, noised: Noised) -> Tensor:
        """Return the training target, float32: the noise, or sqrt(abar) * noise - sqrt(1 - abar) * latent."""
        if not self.predicts_velocity:
            return noised.noise_BCHW.float()
        signal_B111, noise_B111 = self._scales(noised.timesteps_B)
        return signal_B111 * noised.noise_BCHW.float() - noise_B111 * noised.clean_BCHW.float()

    def loss(self, prediction_BCHW: Tensor, target_BCHW: Tensor, noised: Noised) -> Tensor:
        """Return the error of every latent value times the weight of its noise level, float32, shape BCHW."""
        threshold_B = None
        if self.weighting.loss_type in ("huber", "smooth_l1"):
            threshold_B = huber_threshold(self.weighting, noised.sigmas_B, noised.timesteps_B, len(self.abar_T))
        error_BCHW = pointwise_error(prediction_BCHW, target_BCHW, self.weighting.loss_type, threshold_B)
        return error_BCHW * self._look_up("weights", noised.timesteps_B).view(-1, 1, 1, 1)

    def on(self, device: torch.device) -> "DDPM":
        """Return this objective with its tables on the device."""
        return replace(self, tables={name: send(self._table(name), device) for name in TABLES})

    def at_timestep(self, timestep: int) -> "DDPM":
        """Return this objective at one fixed timestep, for validation."""
        return replace(self, min_timestep=timestep, max_timestep=timestep)

    def _scales(self, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return sqrt(abar) and sqrt(1 - abar), float32, shape B111."""
        signal_B, noise_B = (self._look_up(name, timesteps_B) for name in ("signal", "noise"))
        return signal_B.view(-1, 1, 1, 1), noise_B.view(-1, 1, 1, 1)

    def _look_up(self, name: str, timesteps_B: Tensor) -> Tensor:
        """Look up a table at the timesteps, on their device. Samplers pass timesteps as floats."""
        # Move the table to the timesteps, not the reverse, so that the host does not wait for the GPU.
        table_T = self.tables[name] if name in self.tables else self._table(name)
        return send(table_T, timesteps_B.device)[timesteps_B.long()]

    def _table(self, name: str) -> Tensor:
        """Compute a table of one value per timestep, float32 rounded from float64."""
        if name == "signal":
            return self.abar_T.sqrt().float()
        if name == "noise":
            return (1 - self.abar_T).sqrt().float()
        if name == "sigmas":
            return sigmas_of(self.abar_T).float()
        return snr_weights(self.weighting, self.snr_T, self.predicts_velocity).float()


def build_ddpm(
    noise: NoiseOptions, weighting: LossOptions, predicts_velocity: bool, schedule: BetaSchedule = LATENT_DIFFUSION
) -> DDPM:
    """Build the objective of the models that were trained on a schedule.

    Raises UserError for timesteps outside the schedule and for invalid Huber thresholds.
    """
    min_timestep, max_timestep = resolve_timestep_range(noise, NUM_TIMESTEPS)
    check_huber(weighting)
    return DDPM(
        abar_T=schedule.abar(noise.zero_terminal_snr),
        # Loss weights use the unchanged schedule, as in sd-scripts: the one with zero terminal SNR ends at 0, where
        # min-SNR and debiased weights would be 0 / 0 and 1 / 0.
        snr_T=snr_of(schedule.abar(zero_terminal_snr=False)),
        predicts_velocity=predicts_velocity,
        min_timestep=min_timestep,
        max_timestep=max_timestep,
        noise=noise,
        weighting=weighting,
    )
