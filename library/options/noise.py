"""How latents are noised."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class NoiseOptions(Options):
    """How latents are noised."""

    min_timestep: int | None = option(None, help="")
    max_timestep: int | None = option(None, help="")
    noise_offset: float | None = option(None, help="")
    noise_offset_random_strength: bool = option(False, help="")
    adaptive_noise_scale: float | None = option(None, help="")
    multires_noise_iterations: int | None = option(None, help="")
    multires_noise_discount: float = option(0.3, help="")
    ip_noise_gamma: float | None = option(None, help="")
    ip_noise_gamma_random_strength: bool = option(False, help="")
    zero_terminal_snr: bool = option(False, help="")
