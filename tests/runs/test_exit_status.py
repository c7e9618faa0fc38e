"""The exit status of a run stopped by a signal: 0 because it is saved, or the signal's on request."""

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from library.checkpoints.headers import read_metadata
from library.training.failures.interruption import Interruption
from tests.running import Finished, make_images

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")

Train = Callable[..., Finished]


@pytest.fixture(autouse=True)
def _hanging_up_is_noticed() -> Iterator[None]:
    """Let SIGHUP stop runs even if the tests were started by nohup, which ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def stop_in_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Return `stop_in_step`; `stop_in_step(2, signal.SIGTERM)` sends the signal during step 2."""
    from library.training.loop.update import Updates

    def arrange(number: int, name: int) -> None:
        honest = Updates.apply

        def step(updates: Updates, window: Any, losses: Any) -> None:
            if window.step + 1 == number:
                os.kill(os.getpid(), name)
            honest(updates, window, losses)

        monkeypatch.setattr(Updates, "apply", step)

    return arrange


@pytest.mark.parametrize(("name", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_exit_status_reports_the_signal_on_request(
    train: Train, base_arguments: list[str], tmp_path: Path, stop_in_step: Any, name: int, status: int
) -> None:
    stop_in_step(2, name)
    assert train([*base_arguments, "--exit_status_on_stop"]).status == status
    assert list((tmp_path / "out").glob("mine*state"))
    assert list((tmp_path / "out").glob("mine*.safetensors"))


def test_without_the_option_a_saved_run_ends_with_0(train: Train, base_arguments: list[str], stop_in_step: Any) -> None:
    stop_in_step(2, signal.SIGTERM)
    assert train(base_arguments).status == 0


def test_a_signal_in_the_last_step_ends_the_run_normally(
    train: Train, base_arguments: list[str], stop_in_step: Any
) -> None:
    stop_in_step(4, signal.SIGTERM)
    assert train([*base_arguments, "--exit_status_on_stop"]).status == 0


def test_a_signal_in_the_last_step_skips_neither_the_validation_nor_the_best_file(
    train: Train, base_arguments: list[str], tmp_path: Path, stop_in_step: Any
) -> None:
    """The last step is the best, as the loss decreases; it is validated because its epoch ends."""
    make_images(tmp_path / "data" / "1_more", 4, seed=3)
    words = [*base_arguments, "--validation_split", "0.5", "--keep_best_checkpoint", "--learning_rate", "1e-2"]
    words += ["--max_train_steps", "5", "--validate_every_n_steps", "4", "--save_precision", "float"]
    measured = {}
    for name in ("plain", "stopped"):
        if name == "stopped":
            stop_in_step(4, signal.SIGTERM)  # noticed in the next step
        done = train([*words, "--output_dir", str(tmp_path / name)]).ok()
        measured[name] = re.findall(r"validation after step (\d+): loss ([\d.]+)", done.stderr)
    assert [step for step, _ in measured["plain"]][-1] == "5" and measured["stopped"] == measured["plain"]
    best = [read_metadata(tmp_path / name / "mine-best.safetensors")["ss_steps"] for name in measured]
    assert best[0] == best[1]
    names = [{path.name for path in (tmp_path / name).iterdir() if path.is_file()} for name in measured]
    assert names[0] == names[1]


@pytest.mark.parametrize("keeps_states", [True, pytest.param(False, marks=pytest.mark.nightly)])
def test_files_saved_on_a_stop_are_rotated_too(
    train: Train, base_arguments: list[str], tmp_path: Path, stop_in_step: Any, keeps_states: bool
) -> None:
    """Stop after steps 3 and 5 of 8; without --save_state only the newest state of a stop allows resuming."""
    words = [*base_arguments, "--max_train_steps", "8", "--save_every_n_steps", "2", "--save_last_n_steps", "1"]
    words += ["--autoresume", *(["--save_state"] if keeps_states else [])]
    for step in (3, 5):
        stop_in_step(step - 1, signal.SIGTERM)
        assert train(words).status == 0
        assert (tmp_path / "out" / f"mine-step{step:08d}-state").is_dir()
    done = train(words)
    assert done.status == 0 and "at step 5 of 8" in done.stderr
    remaining = {"mine.safetensors", "mine-state", "mine-step00000008.safetensors"}
    remaining.add("mine-step00000008-state" if keeps_states else "mine-step00000005-state")
    assert {path.name for path in (tmp_path / "out").iterdir()} == remaining


def test_a_closing_terminal_may_send_its_signal_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "kill", lambda *signal_arguments: sent.append(signal_arguments))
    monkeypatch.setattr(signal, "signal", lambda *signal_arguments: None)
    interruption = Interruption()
    interruption.defer()
    interruption._receive(signal.SIGHUP, None)
    interruption._receive(signal.SIGHUP, None)
    assert interruption.is_requested and sent == []
    interruption._receive(signal.SIGTERM, None)
    assert sent == [(os.getpid(), signal.SIGTERM)]


def test_a_hangup_that_nohup_ignores_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    monkeypatch.setattr(signal, "signal", lambda number, handler: taken.append(number))
    interruption = Interruption()
    interruption.install()
    interruption.disarm()
    assert taken == [signal.SIGINT, signal.SIGTERM]
