"""What a run leaves and says after an error in mid-run or a bad value."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from library.checkpoints.files import load_state_dict
from library.training.loop import loop
from library.training.loop.update import Updates
from library.training.run_parts import Run
from tests.running import Finished, launch_command

Train = Callable[..., Finished]


def test_a_quiet_launcher_prints_nothing_after_the_error() -> None:
    command = launch_command("train_network.py")
    command.insert(command.index("--num_cpu_threads_per_process"), "--quiet")
    done = subprocess.run([*command, "--train_batch_size", "0"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().endswith("ERROR    --train_batch_size is 0; use at least 1, or leave it out")


def before_batch(monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], Any]) -> None:
    """Perform an action the first time that this batch is about to be processed."""
    honest, waiting = loop.backward, [number]

    def backward(run: Run, batch: Any, batch_number: int, window_size: int, step: int) -> torch.Tensor:
        if batch_number + 1 in waiting:
            waiting.clear()
            action()
        return honest(run, batch, batch_number, window_size, step)

    monkeypatch.setattr(loop, "backward", backward)


def assert_resumes_to_the_same_result(train: Train, words: list[str], tmp_path: Path) -> None:
    again = train([*words, "--autoresume"]).ok()
    assert "resuming from" in again.stderr
    assert train([*words, "--output_dir", str(tmp_path / "whole")]).status == 0
    actual, other = (load_state_dict(tmp_path / name / "mine.safetensors") for name in ("out", "whole"))
    assert actual.keys() == other.keys() and all(torch.equal(actual[key], other[key]) for key in actual)


def test_an_image_deleted_in_mid_run_loses_no_step(
    train: Train, base_arguments: list[str], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {path: path.read_bytes() for path in images.rglob("*.png")}
    before_batch(monkeypatch, 2, lambda: [path.unlink() for path in content])
    done = train(base_arguments)
    assert done.status == 1 and "Traceback" not in done.stderr
    state = tmp_path / "out" / "mine-step00000002-state"
    last = done.stderr.rstrip().splitlines()[-1]
    assert "training ended after step 2; the adapter and the state of that step are saved: once the cause is" in last
    assert f"--resume {state} or --autoresume" in last
    assert (tmp_path / "out" / "mine-step00000002.safetensors").is_file() and state.is_dir()
    for path, data in content.items():
        path.write_bytes(data)
    assert_resumes_to_the_same_result(train, base_arguments, tmp_path)


def test_an_unexpected_error_keeps_its_traceback(
    train: Train, base_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_batch(monkeypatch, 3, lambda: 1 / 0)
    done = train(base_arguments)
    assert done.status == 1 and "ZeroDivisionError" in done.stderr and "Traceback" in done.stderr
    assert "training ended after step 2" in done.stderr.rstrip().splitlines()[-1]
    assert (tmp_path / "out" / "mine-step00000002-state").is_dir()


def test_an_error_during_the_first_step_writes_nothing(
    train: Train, base_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_batch(monkeypatch, 1, lambda: 1 / 0)
    done = train(base_arguments)
    assert done.status == 1 and "training ended" not in done.stderr
    assert not list((tmp_path / "out").glob("*"))


def test_partly_updated_weights_are_not_saved_as_a_state(
    train: Train, base_arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, count = Updates.apply, iter(range(9))

    def step(*arguments: Any) -> None:
        honest(*arguments)
        if next(count) == 2:
            raise RuntimeError("the card is gone")

    monkeypatch.setattr(Updates, "apply", step)
    done = train(base_arguments)
    assert done.status == 1
    assert "the error came during the weight update of step 3; the weights are saved as they are in" in done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine-step00000002.safetensors"]


# Invalid values that libraries would reject with a traceback end the run with a sentence naming the option.


def test_logs_that_cannot_be_written_do_not_end_a_run(train: Train, base_arguments: list[str], tmp_path: Path) -> None:
    done = train([*base_arguments, "--max_train_steps", "1", "--logging_dir", "/proc/x"])
    assert done.status == 0 and "--logging_dir /proc/x: charts are off" in done.stderr
    assert (tmp_path / "out" / "mine.safetensors").exists()


def test_a_damaged_tokenizer_is_named(
    train: Train, base_arguments: list[str], tiny_sd_folder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_sd_folder, tmp_path / "model")
    for file in (model / "tokenizer").glob("*.json"):
        if file.name in ("vocab.json", "tokenizer.json"):
            file.write_text("{broken")
    done = train([str(model) if word == str(tiny_sd_folder) else word for word in base_arguments])
    assert done.status == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"the tokenizer {model / 'tokenizer'} cannot be read" in done.stderr
