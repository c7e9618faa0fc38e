"""Options of flow matching: sampling and weighting of noise levels, and the form of the prediction."""

from dataclasses import dataclass

from library.options.base import Options, option
from library.options.kinds import number, whole

WEIGHTING_SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")
HYBRIDS = ("qinglong_flux", "qinglong_qwen")
TIMESTEP_SAMPLINGS = (
    "sigma", "uniform", "sigmoid", "shift", "flux_shift", "flux2_shift", "qwen_shift", "krea2_shift", "logsnr",
    *HYBRIDS,
)  # fmt: skip
LOGSNR = "timestep_sampling=logsnr|qinglong_flux"
PREDICTION_TYPES = ("raw", "additive", "sigma_scaled")


@dataclass(frozen=True)
class FlowWeightingOptions(Options):
    """Distribution and loss weights of noise levels, in the terms of the SD3 paper (Esser et al. 2024)."""

    weighting_scheme: str = option("uniform", usual=True, choices=WEIGHTING_SCHEMES)
    """Which noise levels are drawn more often (logit_normal, mode) or count more (sigma_sqrt, cosmap). uniform and none
    treat all alike."""
    logit_mean: float = option(0.0, needs_images=True, needs=("weighting_scheme=logit_normal", LOGSNR))
    """Mean of the normal distribution behind --weighting_scheme logit_normal, and of the log-SNR of --timestep_sampling
    logsnr."""
    logit_std: float = option(1.0, kind=number(0), needs_images=True, needs=("weighting_scheme=logit_normal", LOGSNR))
    """Standard deviation of the normal distribution behind --weighting_scheme logit_normal, and of the log-SNR of
    --timestep_sampling logsnr."""
    mode_scale: float = option(
        1.29,
        kind=number(-1, 1.75),
        # 2 / (pi - 2) is the maximum; larger scales leave 0..1
        needs_images=True,
        needs="weighting_scheme=mode",
        help="How strongly --weighting_scheme mode prefers middle noise levels, -1 to 1.75. 0 treats all alike.",
    )


@dataclass(frozen=True)
class FlowSamplingOptions(Options, needs_images=True):
    """Sampling of noise levels.

    Base models with other defaults give them to `group`.
    """

    timestep_sampling: str = option("sigma", usual=True, choices=TIMESTEP_SAMPLINGS)
    """How noise levels are drawn: sigma from a table by --weighting_scheme, uniform, sigmoid of a normal draw, shift as
    sigmoid with --discrete_flow_shift, flux_shift (or flux2_shift), qwen_shift and krea2_shift with a shift that grows
    with the image, logsnr with a normal log-SNR, qinglong_flux and qinglong_qwen as a mixture."""
    sigmoid_scale: float = option(
        1.0,
        kind=number(0),
        needs="timestep_sampling=sigmoid|shift|flux_shift|flux2_shift|qwen_shift|krea2_shift|qinglong_flux|"
        "qinglong_qwen",
    )
    """Factor on the normal draw of --timestep_sampling sigmoid and of those that shift it. Above 1 trains more very
    clean and very noisy levels."""
    discrete_flow_shift: float = option(3.0, usual=True, kind=number(above=0), needs="timestep_sampling=sigma|shift")
    """How far --timestep_sampling sigma and shift push noise levels toward pure noise. 1 leaves them alone."""
    num_timestep_buckets: int | None = option(
        None,
        kind=whole(0, 1000),
        # whole timesteps
        help="Divide the distribution of noise levels into N equal parts and draw each equally often, so that small "
        "datasets see all levels evenly. Unset, 0 or 1 draws each level independently.",
    )
    preserve_distribution_shape: bool = option(False, needs=("min_timestep", "max_timestep"))
    """Cut the distribution of noise levels off at --min_timestep and --max_timestep, instead of scaling it to fit
    between them."""


@dataclass(frozen=True)
class FlowPredictionOptions(Options):
    """The form in which the denoiser's output is compared with the target."""

    model_prediction_type: str = option(
        "raw", usual=True, ignored_by_leco="the denoiser's own output is trained", choices=PREDICTION_TYPES
    )
    """What is compared with the target: raw is the output itself, additive adds the noisy latent to it, sigma_scaled
    estimates the clean latent from it. Only raw fits what the model was made for."""


@dataclass(frozen=True)
class TimestepPreviewOptions(Options, affects_training=False, needs_images=True):
    """Display of the noise levels that would be drawn, without a model or images."""

    show_timesteps: str | None = option(None, usual=True, choices=("console", "image"))
    """Show how often each noise level is drawn with these settings and how much it counts, then end: a table on the
    console, or as a file (image) in --output_dir."""
    show_timesteps_resolution: str = option("1024", needs="show_timesteps")
    """Size in pixels that --show_timesteps assumes, N for a square or HEIGHT,WIDTH. It matters where levels depend on
    the size of the image."""
    show_timesteps_offset: float = option(0.0, needs="show_timesteps")
    """Offset on the normal draw that --show_timesteps assumes, as timestep_sampling.offset of a subset does. Above 0
    moves the levels toward noise."""
