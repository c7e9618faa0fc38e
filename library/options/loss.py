"""How the prediction is compared and weighted."""

from dataclasses import dataclass

from library.options.base import Options, option


@dataclass(frozen=True)
class LossOptions(Options):
    """How the prediction is compared and weighted."""

    loss_type: str = option("l2", help="", choices=("l1", "l2", "huber", "smooth_l1"))
    huber_schedule: str = option("snr", help="", choices=("constant", "exponential", "snr"))
    huber_c: float = option(0.1, help="")
    huber_scale: float = option(1.0, help="")
    min_snr_gamma: float | None = option(None, help="")
    scale_v_pred_loss_like_noise_pred: bool = option(False, help="")
    v_pred_like_loss: float | None = option(None, help="")
    debiased_estimation_loss: bool = option(False, help="")
