"""The moving average and the names of learning rates."""

import io
import math
import sys

import pytest

from library.training.reporting.progress import LossAverage
from library.training.reporting.report import announce, rate_values


def test_average_keeps_the_last_loss_of_each_place_of_an_epoch() -> None:
    average = LossAverage()
    for place, loss in enumerate([1.0, 2.0, 6.0]):
        average.add(place, loss)
    assert average.mean == pytest.approx(3.0)
    average.add(0, 4.0)
    assert average.mean == pytest.approx((4 + 2 + 6) / 3)


def test_average_shows_nan_and_recovers_when_it_is_replaced() -> None:
    average = LossAverage()
    average.add(0, math.nan)
    average.add(1, 2.0)
    assert math.isnan(average.mean)
    average.add(0, 4.0)
    assert average.mean == pytest.approx(3.0)


def test_rates_carry_their_own_name_and_their_place() -> None:
    assert rate_values([1e-4, 2e-4, 3e-4], ["textencoder", "unet", "unet plus"], None, True) == {
        "lr/textencoder": 1e-4,
        "lr/unet": 2e-4,
        "lr/unet plus": 3e-4,
        "lr/group1": 2e-4,
        "lr/group2": 3e-4,
    }


def test_with_the_unet_alone_no_group_is_called_textencoder() -> None:
    assert rate_values([2e-4], ["unet"], None, False) == {"lr/unet": 2e-4, "lr/group0": 2e-4}


def test_rates_that_the_optimizer_finds_are_shown_beside() -> None:
    values = rate_values([1.0], ["unet"], [3e-5], False)
    assert values["lr/d*lr/unet"] == 3e-5


def test_a_standard_output_that_takes_nothing_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    output = Full()
    monkeypatch.setattr(sys, "stdout", output)
    announce("model saved.")
    assert output.getvalue() == "model saved.\n"
