"""The moving average and the names of learning rates."""

import importlib
import io
import math
import os
import shlex
import sys
from pathlib import Path

import pytest

from library.architectures.flux.options import FluxOptions
from library.checkpoints.relative_change import judge_change
from library.training.command_line.results import format_draw_command
from library.training.reporting.console_lines import (
    ImageCounts,
    announce,
    announce_run,
    duration,
    list_finished,
    rate_values,
)
from library.training.reporting.progress import LossAverage
from library.training.step.accumulation import StepPlan


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


def test_the_last_lines_name_steps_duration_file_and_best_checkpoint(tmp_path: Path) -> None:
    end, best = tmp_path / "m.safetensors", tmp_path / "m-best.safetensors"
    first, file = "trained networks.lora of rank 4 on sd: 40 steps in 1 min 05 s", f"the adapter is {end}"
    trained = (first.removeprefix("trained ").partition(":")[0], 40, 65, end)
    assert list_finished(*trained, None, None, best) == [first, file]
    change = f"it changes the adapted weights by 0.21%: {judge_change(0.0021)}"
    lowest = "the validation loss was lowest after step 30, 0.1250"
    hint = " (--keep_best_checkpoint keeps those weights)"
    assert list_finished(*trained, 0.0021, (30, 0.125), best) == [first, lowest + hint, file, change]
    best.touch()
    assert list_finished(*trained, None, (30, 0.125), best)[1] == f"{lowest}: {best}"


@pytest.mark.parametrize("kind", ["terminal", "file", "pipe"])
def test_a_person_reads_no_bilingual_block(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, (source, end) = tmp_path / "log", os.pipe()
    with open(end if kind == "pipe" else path, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(stream, "isatty", lambda: kind == "terminal")
        announce_run(StepPlan(6, 2, 6), ImageCounts(12, 3, 0), [2], 2)
    text = os.read(source, 5000).decode() if kind == "pipe" else path.read_text(encoding="utf-8")
    assert ("学習" in text) == (kind == "pipe") and all(len(line) <= 80 for line in text.splitlines()) and text


def test_the_command_that_draws_has_the_parts_of_the_run() -> None:
    values = {"pretrained_model_name_or_path": "a b", "ae": "ae.sft", "mixed_precision": "bf16"}
    words = "--prompt 'a prompt as your captions are' --mixed_precision bf16 --ae ae.sft"
    command = format_draw_command(FluxOptions().with_values(values), Path("m.safetensors"))
    start, _, rest = command.partition(" --prompt ")
    assert start == "python3 tools/draw.py 'a b' --adapter m.safetensors"
    assert sorted(shlex.split("--prompt " + rest)) == sorted(shlex.split(words))
    parser = importlib.import_module("tools.draw").setup_parser()
    assert parser.parse_known_args(shlex.split(command)[2:])[0].model == "a b"
