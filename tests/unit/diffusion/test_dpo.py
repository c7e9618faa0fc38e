"""The preference loss by hand, and what is read from it."""

from math import log

import pytest
import torch

from library.diffusion.dpo import implicit_accuracy, invert_losses, preference_losses


def test_an_untrained_adapter_is_right_half_of_the_time_and_loses_log_2() -> None:
    errors = torch.rand(6)
    losses = preference_losses(errors, errors, 2000.0)
    torch.testing.assert_close(losses, torch.full((3,), log(2.0)))
    assert implicit_accuracy(losses) == 0.5


def test_margins_are_read_from_losses() -> None:
    """Also where the loss is so small that 1 + loss is 1, and where its exponential overflows."""
    margins = torch.tensor([-900.0, -20.0, -0.3, 0.0, 1e-3, 5.0, 60.0])
    losses = -torch.nn.functional.logsigmoid(margins)
    torch.testing.assert_close(invert_losses(losses).float(), margins, rtol=1e-5, atol=1e-6)
    assert implicit_accuracy(losses) == pytest.approx((3 + 0.5) / 7)
    assert invert_losses(torch.zeros(1)) > 100


def test_the_margin_grows_where_the_preferred_image_gains_and_the_rejected_one_loses() -> None:
    losses = preference_losses(torch.tensor([0.1, 0.4, 0.5, 0.2]), torch.tensor([0.2, 0.3, 0.4, 0.3]), 10.0)
    torch.testing.assert_close(invert_losses(losses).float(), torch.tensor([5 * (0.1 + 0.1), 5 * (-0.1 - 0.1)]))
