"""Options of the noise that is added to latents."""

from dataclasses import dataclass

from library.options.base import Options, option
from library.options.kinds import number, whole

MOST_NOISE = 100.0  # multiples of the noise itself; training fails long before


@dataclass(frozen=True)
class NoiseOptions(Options):
    """Noise that is added to latents."""

    min_timestep: int | None = option(
        None, kind=whole(0, 1000), ignored_by_leco="noise levels are those of the denoising steps, drawn uniformly"
    )
    """Lowest timestep to train, 0 to 999: the cleaner end. Unset is 0."""
    max_timestep: int | None = option(
        None, kind=whole(1, 1000), ignored_by_leco="noise levels are those of the denoising steps, drawn uniformly"
    )
    """Timestep to stay below in training, 1 to 1000: the noisier end. Unset is 1000."""
    noise_offset: float | None = option(None, usual=True, kind=number(-MOST_NOISE, MOST_NOISE))
    """Strength of noise that shifts whole colour channels, for darker darks and brighter brights; 0.05 is usual. Unset
    adds none."""
    noise_offset_random_strength: bool = option(False, needs="noise_offset")
    """Draw the strength of the noise offset for each step, between 0 and --noise_offset."""
    adaptive_noise_scale: float | None = option(
        None,
        requires="noise_offset",
        kind=number(-MOST_NOISE, MOST_NOISE),
        ignored_by_leco="there are no images whose brightness it could follow",
    )
    """Factor on the mean brightness of the latents that is added to --noise_offset. Unset adds nothing."""
    multires_noise_iterations: int | None = option(None, kind=whole(0))
    """Number of coarser noise layers added to the noise, 6 to 10 is usual. Unset adds none."""
    multires_noise_discount: float = option(0.3, kind=number(0), needs="multires_noise_iterations")
    """Factor by which each coarser noise layer is weaker than the one before, 0 to 1."""
    ip_noise_gamma: float | None = option(
        None, kind=number(0, MOST_NOISE), ignored_by_leco="the model generates the latents, so no noise is added"
    )
    """Strength of extra noise on the model's input that the target does not contain; 0.1 is usual. Unset adds none."""
    ip_noise_gamma_random_strength: bool = option(
        False, needs="ip_noise_gamma", ignored_by_leco="the model generates the latents, so no noise is added"
    )
    """Draw the strength of the input noise for each step, between 0 and --ip_noise_gamma."""
    zero_terminal_snr: bool = option(False)
    """Change the noise schedule so that the last timestep is pure noise. For models with --v_parameterization."""
