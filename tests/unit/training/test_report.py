"""The moving average and the names of learning rates."""

import io
import math
import sys
from pathlib import Path

import pytest

from library.checkpoints.relative_change import judge_change
from library.training.reporting.console_lines import announce, duration, format_finished, rate_values
from library.training.reporting.progress import LossAverage


def test_the_average_keeps_the_last_loss_of_each_position_of_an_epoch() -> None:
    average = LossAverage()
    for place, loss in enumerate([1.0, 2.0, 6.0]):
        average.add(place, loss)
    assert average.mean == pytest.approx(3.0)
    average.add(0, 4.0)
    assert average.mean == pytest.approx((4 + 2 + 6) / 3)


def test_the_average_becomes_nan_and_recovers_when_the_loss_is_replaced() -> None:
    average = LossAverage()
    average.add(0, math.nan)
    average.add(1, 2.0)
    assert math.isnan(average.mean)
    average.add(0, 4.0)
    assert average.mean == pytest.approx(3.0)


def test_rates_are_labelled_with_their_name_and_index() -> None:
    assert rate_values([1e-4, 2e-4, 3e-4], ["textencoder", "unet", "unet plus"], None, True) == {
        "lr/textencoder": 1e-4,
        "lr/unet": 2e-4,
        "lr/unet plus": 3e-4,
        "lr/group1": 2e-4,
        "lr/group2": 3e-4,
    }


def test_training_only_the_unet_names_no_group_textencoder() -> None:
    assert rate_values([2e-4], ["unet"], None, False) == {"lr/unet": 2e-4, "lr/group0": 2e-4}


def test_rates_adapted_by_the_optimizer_are_shown_too() -> None:
    assert rate_values([1.0, 0.5], ["textencoder", "unet"], [3e-5, 2e-5], True) == {
        "lr/textencoder": 1.0,
        "lr/unet": 0.5,
        "lr/group1": 0.5,
        "lr/d*lr/textencoder": 3e-5,
        "lr/d*lr/unet": 2e-5,
        "lr/d*lr/group1": 2e-5,
    }


def test_a_failing_standard_output_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    output = Full()
    monkeypatch.setattr(sys, "stdout", output)
    announce("model saved.")
    assert output.getvalue() == "model saved.\n"


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3720, "1 h 02 min")]
)
def test_durations_have_two_units_at_most(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_the_last_line_names_steps_duration_file_and_best_checkpoint(tmp_path: Path) -> None:
    end, best = tmp_path / "m.safetensors", tmp_path / "m-best.safetensors"
    line = format_finished("networks.lora of rank 4 on sd", 40, 65, end, None, None, best)
    assert line == f"trained networks.lora of rank 4 on sd: 40 steps in 1 min 05 s; the adapter is {end}"
    lowest = "; the validation loss was lowest after step 30, 0.1250"
    assert format_finished("x", 40, 65, end, 0.0021, None, best).endswith(
        f"{end}; it changes the adapted weights by 0.21%: {judge_change(0.0021)}"
    )
    hint = " (--keep_best_checkpoint keeps those weights)"
    assert format_finished("x", 40, 65, end, None, (30, 0.125), best).endswith(lowest + hint)
    best.touch()
    assert format_finished("x", 40, 65, end, None, (30, 0.125), best).endswith(f"{lowest}: {best}")
