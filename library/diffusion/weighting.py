"""Loss functions, and loss weights by noise level.

Letters: B samples, C channels, H height, W width, T noise levels.
"""

import torch
from torch import Tensor

from library.base.errors import about
from library.options.training.loss import LossOptions

MAX_SNR = 1000.0  # the first timesteps are nearly clean; uncapped they would dominate the weights


def pointwise_error(prediction_BCHW: Tensor, target_BCHW: Tensor, loss_type: str, threshold_B: Tensor | None) -> Tensor:
    """Return the elementwise error, float32. `threshold_B` is where huber and smooth_l1 change from quadratic to
    linear.

    With d = prediction - target and threshold c, huber is 2c (sqrt(d^2 + c^2) - c) and smooth_l1 is 2 (sqrt(d^2 + c^2)
    - c) (pseudo-Huber, Charbonnier et al. 1997).
    """
    difference_BCHW = prediction_BCHW.float() - target_BCHW.float()
    if loss_type == "l2":
        return difference_BCHW.square()
    if loss_type == "l1":
        return difference_BCHW.abs()
    assert loss_type in ("huber", "smooth_l1") and threshold_B is not None
    c_B111 = threshold_B.float().view(-1, *[1] * (difference_BCHW.ndim - 1))
    square_BCHW = difference_BCHW.square()
    # Equals sqrt(d^2 + c^2) - c, without cancellation for small differences.
    arc_BCHW = square_BCHW / ((square_BCHW + c_B111.square()).sqrt() + c_B111)
    return 2 * c_B111 * arc_BCHW if loss_type == "huber" else 2 * arc_BCHW


def huber_threshold(options: LossOptions, sigmas_B: Tensor, timesteps_B: Tensor, num_timesteps: int) -> Tensor:
    """Return each sample's Huber threshold, multiplied by `huber_scale`.

    With c = huber_c, constant is c; exponential falls from 1 at timestep 0 to c at the last one; snr falls from 1 at
    the clean end to c with the noise level, (1 - c) / (1 + sigma)^2 + c.
    """
    check_huber(options)
    if options.huber_schedule == "constant":
        c_B = torch.full_like(sigmas_B, options.huber_c, dtype=torch.float32)
    elif options.huber_schedule == "exponential":
        c_B = options.huber_c ** (timesteps_B.float() / num_timesteps)
    else:
        c_B = (1 - options.huber_c) / (1 + sigmas_B.float()) ** 2 + options.huber_c
    return options.huber_scale * c_B


def check_huber(options: LossOptions) -> None:
    """Raise UserError if huber_c or huber_scale is not positive but the loss type uses them."""
    if options.loss_type not in ("huber", "smooth_l1"):
        return
    for flag, value in (("--huber_c", options.huber_c), ("--huber_scale", options.huber_scale)):
        if value <= 0:
            raise about(flag)(f"is {value}; with --loss_type {options.loss_type} it must be above 0")


def snr_weights(options: LossOptions, snr_T: Tensor, predicts_velocity: bool) -> Tensor:
    """Return the product of all loss weights that depend on the signal-to-noise ratio, for each ratio in `snr_T`.

    In order of application: min-SNR (Hang et al. 2023), velocity weighted like noise, noise weighted like velocity,
    debiased estimation (Yu et al. 2024).
    """
    capped_T = snr_T.clamp(max=MAX_SNR)
    weights_T = torch.ones_like(snr_T)
    if gamma := options.min_snr_gamma:
        weights_T = weights_T * snr_T.clamp(max=gamma) / (snr_T + 1 if predicts_velocity else snr_T)
    if options.scale_v_pred_loss_like_noise_pred:
        weights_T = weights_T * capped_T / (capped_T + 1)
    if factor := options.v_pred_like_loss:
        weights_T = weights_T * (1 + factor * (capped_T + 1) / capped_T)
    if options.debiased_estimation_loss:
        weights_T = weights_T / (capped_T + 1 if predicts_velocity else capped_T.sqrt())
    return weights_T
