"""The preference loss, compared with hand-computed values, and the statistics derived from it."""

from math import log

import pytest
import torch

from library.diffusion.dpo import implicit_accuracy, invert_losses, preference_losses


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
