"""How much each error counts: the error of one latent value, and the weight of its noise level.

Letters: B samples, C channels, H height, W width; S signal-to-noise ratio.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from library.options.loss import LossOptions

MAX_SNR = 1000.0  # the first timesteps are nearly clean; without a cap they would rule the weights


def pointwise_error(prediction_BCHW: Tensor, target_BCHW: Tensor, loss_type: str, threshold_B: Tensor | None) -> Tensor:
    """The error of every value, float32. `threshold_B` is where huber and smooth_l1 turn from square to straight.

    With d = prediction - target and threshold c, huber is 2c (sqrt(d^2 + c^2) - c) and smooth_l1 is
    2 (sqrt(d^2 + c^2) - c) (pseudo-Huber, Charbonnier et al. 1997).
    """
    difference_BCHW = prediction_BCHW.float() - target_BCHW.float()
    if loss_type == "l2":
        return difference_BCHW.square()
    if loss_type == "l1":
        return difference_BCHW.abs()
    if loss_type not in ("huber", "smooth_l1"):
        raise ValueError(f"--loss_type is {loss_type!r}; choose l2, l1, huber or smooth_l1")
    assert threshold_B is not None
    c_B111 = threshold_B.float().view(-1, *[1] * (difference_BCHW.ndim - 1))
    square_BCHW = difference_BCHW.square()
    # sqrt(d^2 + c^2) - c, written so that small differences do not cancel away
    arc_BCHW = square_BCHW / ((square_BCHW + c_B111.square()).sqrt() + c_B111)
    return 2 * c_B111 * arc_BCHW if loss_type == "huber" else 2 * arc_BCHW


def huber_threshold(options: LossOptions, sigmas_B: Tensor, timesteps_B: Tensor, num_timesteps: int) -> Tensor:
    """The threshold c of each sample, times --huber_scale.

    constant is --huber_c; exponential falls from 1 at timestep 0 to --huber_c at the last one; snr goes from 1 at the
    clean end to --huber_c with the noise level, (1 - huber_c) / (1 + sigma)^2 + huber_c.
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
    """Raise ValueError for thresholds that make no loss and for an unknown schedule."""
    for flag, value in (("--huber_c", options.huber_c), ("--huber_scale", options.huber_scale)):
        if value <= 0:
            raise ValueError(f"{flag} is {value}; with --loss_type {options.loss_type} it must be above 0")
    if options.huber_schedule not in ("constant", "exponential", "snr"):
        raise ValueError(f"--huber_schedule is {options.huber_schedule!r}; choose constant, exponential or snr")


def snr_weights(options: LossOptions, snr_B: Tensor, predicts_velocity: bool) -> Tensor:
    """The product of all weights that depend on the signal-to-noise ratio, float32, shape B.

    In the order of application: --min_snr_gamma (Hang et al. 2023), --scale_v_pred_loss_like_noise_pred,
    --v_pred_like_loss, --debiased_estimation_loss (Yu et al. 2024).
    """
    capped_B = snr_B.clamp(max=MAX_SNR)
    weights_B = torch.ones_like(snr_B)
    if gamma := options.min_snr_gamma:
        weights_B = weights_B * snr_B.clamp(max=gamma) / (snr_B + 1 if predicts_velocity else snr_B)
    if options.scale_v_pred_loss_like_noise_pred:
        weights_B = weights_B * capped_B / (capped_B + 1)
    if factor := options.v_pred_like_loss:
        weights_B = weights_B * (1 + factor * (capped_B + 1) / capped_B)
    if options.debiased_estimation_loss:
        weights_B = weights_B / (capped_B + 1 if predicts_velocity else capped_B.sqrt())
    return weights_B.float()


def check_weighting(options: LossOptions, predicts_velocity: bool, warn: Callable[[str], None]) -> None:
    """Raise ValueError for settings that exclude each other; name the ones without effect to `warn`."""
    if options.scale_v_pred_loss_like_noise_pred and not predicts_velocity:
        raise ValueError(
            "--scale_v_pred_loss_like_noise_pred rescales the loss of v prediction; add --v_parameterization or drop it"
        )
    if options.v_pred_like_loss and predicts_velocity:
        raise ValueError(
            f"--v_pred_like_loss is {options.v_pred_like_loss}, but --v_parameterization has that loss already; "
            "drop one of them"
        )
    for flag, value in (("--min_snr_gamma", options.min_snr_gamma), ("--v_pred_like_loss", options.v_pred_like_loss)):
        if value is not None and value < 0:
            raise ValueError(f"{flag} is {value}; it must be above 0, or unset")
    if options.loss_type in ("huber", "smooth_l1"):
        check_huber(options)
        return
    defaults = LossOptions()
    for name in ("huber_schedule", "huber_c", "huber_scale"):
        if getattr(options, name) != getattr(defaults, name):
            warn(f"--{name} has no effect with --loss_type {options.loss_type}; it belongs to huber and smooth_l1")
