"""Options of the loss."""

from dataclasses import dataclass

from library.options.base import Options, option
from library.options.kinds import number

HUBER_SCHEDULES = ("constant", "exponential", "snr")


@dataclass(frozen=True)
class LossOptions(Options):
    """How the prediction is compared with the target, and weighted."""

    loss_type: str = option("l2", usual=True, choices=("l1", "l2", "huber", "smooth_l1"))
    """Loss function of the difference to the target: l2 is its square, l1 its absolute value; huber and smooth_l1 lie
    between and are less sensitive to outliers than l2."""
    huber_schedule: str = option("snr", needs="loss_type=huber|smooth_l1", choices=HUBER_SCHEDULES)
    """How the threshold of huber and smooth_l1 depends on the timestep: constant, exponential, or snr by the share of
    noise."""
    huber_c: float = option(0.1, kind=number(0), needs="loss_type=huber|smooth_l1")
    """Threshold of huber and smooth_l1 at the noisy end. Differences above it count like l1."""
    huber_scale: float = option(1.0, kind=number(0), needs="loss_type=huber|smooth_l1")
    """Factor on the threshold of huber and smooth_l1."""
    min_snr_gamma: float | None = option(None, usual=True, kind=number(0))
    """Limit on the weight of nearly clean timesteps (min-SNR, 5 is usual). Unset weights all timesteps alike."""
    scale_v_pred_loss_like_noise_pred: bool = option(False, requires="v_parameterization")
    """Weight timesteps of a model with --v_parameterization as predicting noise would."""
    v_pred_like_loss: float | None = option(
        None, excludes={"v_parameterization": "it is for models that predict noise"}
    )
    """Factor for adding the loss weighted as for v prediction to that of a model that predicts noise. Unset adds
    nothing."""
    debiased_estimation_loss: bool = option(False)
    """Weight timesteps by the inverse root of the signal-to-noise ratio, which favours noisy ones."""
