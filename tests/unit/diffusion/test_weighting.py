"""Pointwise errors, weights of noise levels and the preference loss, compared with plain arithmetic."""

import math
from math import log

import pytest
import torch
from torch import Tensor

from library.diffusion.dpo import implicit_accuracy, invert_losses, preference_losses
from library.diffusion.weighting import huber_threshold, pointwise_error, snr_weights
from library.options.training.loss import LossOptions

SNRS = (1175.4705882352941, 300.0, 5.0, 1.0, 0.37, 0.0046819)


def weights(predicts_velocity: bool, **settings: float | bool) -> list[float]:
    snr_T = torch.tensor(SNRS, dtype=torch.float64)
    return snr_weights(LossOptions(**settings), snr_T, predicts_velocity).tolist()  # type: ignore[arg-type]


def test_without_options_every_level_has_weight_1() -> None:
    assert weights(False) == weights(True) == [1.0] * len(SNRS)


def test_min_snr_gamma_matches_its_formula() -> None:
    assert weights(False, min_snr_gamma=5.0) == pytest.approx([min(s, 5.0) / s for s in SNRS])
    assert weights(True, min_snr_gamma=5.0) == pytest.approx([min(s, 5.0) / (s + 1) for s in SNRS])


def test_scale_v_pred_loss_like_noise_pred_matches_its_formula() -> None:
    expected = [min(s, 1000) / (min(s, 1000) + 1) for s in SNRS]
    assert weights(True, scale_v_pred_loss_like_noise_pred=True) == pytest.approx(expected)


def test_v_pred_like_loss_adds_a_share_of_the_velocity_loss() -> None:
    expected = [1 + 0.4 * (min(s, 1000) + 1) / min(s, 1000) for s in SNRS]
    assert weights(False, v_pred_like_loss=0.4) == pytest.approx(expected)


def test_debiased_estimation_matches_its_formula() -> None:
    assert weights(False, debiased_estimation_loss=True) == pytest.approx([min(s, 1000) ** -0.5 for s in SNRS])
    assert weights(True, debiased_estimation_loss=True) == pytest.approx([1 / (min(s, 1000) + 1) for s in SNRS])


def test_weights_multiply() -> None:
    each = [
        weights(True, min_snr_gamma=2.5),
        weights(True, scale_v_pred_loss_like_noise_pred=True),
        weights(True, debiased_estimation_loss=True),
    ]
    together = weights(True, min_snr_gamma=2.5, scale_v_pred_loss_like_noise_pred=True, debiased_estimation_loss=True)
    assert together == pytest.approx([math.prod(factors) for factors in zip(*each, strict=True)])


# --- errors ---------------------------------------------------------------------------------------------------------


def pair(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prediction, target = torch.randn(2, 3, 2, 4, 5, generator=generator)
    return prediction, target


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_huber_and_smooth_l1_match_a_float64_computation(loss_type: str) -> None:
    prediction, target = pair(61)
    c_B = torch.tensor([1.0, 0.1, 0.003])
    d, c = (prediction - target).double(), c_B.double().view(3, 1, 1, 1)
    expected = (2 * c if loss_type == "huber" else 2) * ((d**2 + c**2).sqrt() - c)
    ours = pointwise_error(prediction, target, loss_type, c_B)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-7)


def test_huber_is_quadratic_for_small_and_linear_for_large_differences() -> None:
    d = torch.tensor([1e-4, 50.0]).view(2, 1, 1, 1)
    small, large = pointwise_error(d, torch.zeros_like(d), "huber", torch.tensor([0.5, 0.5])).flatten().tolist()
    assert small == pytest.approx(1e-8, rel=1e-5), "no cancellation"
    assert large == pytest.approx(2 * 0.5 * (50 - 0.5), rel=1e-3)


def test_the_gradient_of_huber_is_zero_where_prediction_and_target_agree() -> None:
    prediction = torch.zeros(1, 1, 1, 2, requires_grad=True)
    pointwise_error(prediction, torch.tensor([[[[0.0, 0.3]]]]), "huber", torch.tensor([0.1])).sum().backward()
    assert prediction.grad is not None
    expected = -2 * 0.1 * 0.3 / math.sqrt(0.3**2 + 0.1**2)
    assert prediction.grad.flatten().tolist() == pytest.approx([0.0, expected])


def test_l2_and_l1_are_squared_and_absolute_errors() -> None:
    prediction, target = pair(62)
    torch.testing.assert_close(pointwise_error(prediction, target, "l2", None), (prediction - target) ** 2)
    torch.testing.assert_close(pointwise_error(prediction, target, "l1", None), (prediction - target).abs())


@pytest.mark.parametrize("loss_type", ["l1", "l2", "huber", "smooth_l1"])
def test_errors_are_float32_under_autocast(loss_type: str) -> None:
    prediction, target = pair(63)
    with torch.autocast("cpu", torch.bfloat16):
        loss = pointwise_error(prediction.bfloat16(), target.bfloat16(), loss_type, torch.tensor([0.1, 0.2, 0.3]))
    exact = pointwise_error(
        prediction.bfloat16().double(), target.bfloat16().double(), loss_type, torch.tensor([0.1, 0.2, 0.3])
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact.float())


def huber_thresholds(schedule: str, **settings: float) -> list[float]:
    options = LossOptions(loss_type="huber", huber_schedule=schedule, **settings)  # type: ignore[arg-type]
    sigmas_B, timesteps_B = torch.tensor([0.0, 0.03, 1.0, 14.6, torch.inf]), torch.tensor([0, 1, 300, 999, 999])
    return huber_threshold(options, sigmas_B, timesteps_B, 1000).tolist()


def test_huber_thresholds_match_the_formula_of_each_schedule() -> None:
    assert huber_thresholds("constant", huber_c=0.2) == pytest.approx([0.2] * 5)
    exponential = [math.exp(math.log(0.2) * t / 1000) for t in (0, 1, 300, 999, 999)]
    assert huber_thresholds("exponential", huber_c=0.2) == pytest.approx(exponential)
    snr = [0.8 / (1 + s) ** 2 + 0.2 for s in (0.0, 0.03, 1.0, 14.6)]
    assert huber_thresholds("snr", huber_c=0.2) == pytest.approx([*snr, 0.2])


@pytest.mark.parametrize("schedule", ["constant", "exponential", "snr"])
def test_huber_scale_applies_to_every_schedule(schedule: str) -> None:
    plain, scaled = huber_thresholds(schedule), huber_thresholds(schedule, huber_scale=1.75)
    assert scaled == pytest.approx([1.75 * c for c in plain])


def test_huber_thresholds_that_are_not_positive_are_refused() -> None:
    for settings, message in (({"huber_c": 0.0}, "--huber_c is 0.0"), ({"huber_scale": -1.0}, "--huber_scale is -1.0")):
        with pytest.raises(ValueError, match=message):
            huber_thresholds("snr", **settings)


# The preference loss, compared with hand-computed values, and the statistics derived from it.


def test_an_untrained_adapter_has_accuracy_one_half_and_loss_log_2() -> None:
    errors = torch.rand(6)
    losses = preference_losses(errors, errors, 2000.0)
    torch.testing.assert_close(losses, torch.full((3,), log(2.0)))
    assert implicit_accuracy(losses) == 0.5


def test_margins_are_recovered_from_losses() -> None:
    """Margins are exact even where 1 + loss rounds to 1 or the exponential of the loss overflows."""
    margins = torch.tensor([-900.0, -20.0, -0.3, 0.0, 1e-3, 5.0, 60.0])
    losses = -torch.nn.functional.logsigmoid(margins)
    torch.testing.assert_close(invert_losses(losses).float(), margins, rtol=1e-5, atol=1e-6)
    assert implicit_accuracy(losses) == pytest.approx((3 + 0.5) / 7)
    assert invert_losses(torch.zeros(1)) > 100


def test_the_margin_is_the_scaled_gain_of_the_preferred_over_the_rejected_image() -> None:
    losses = preference_losses(torch.tensor([0.1, 0.4, 0.5, 0.2]), torch.tensor([0.2, 0.3, 0.4, 0.3]), 10.0)
    torch.testing.assert_close(invert_losses(losses).float(), torch.tensor([5 * (0.1 + 0.1), 5 * (-0.1 - 0.1)]))
