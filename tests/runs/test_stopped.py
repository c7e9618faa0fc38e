"""The status of a run that a signal stopped: it is saved, which is no error, unless one asks to be told."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.running import Finished

Train = Callable[..., Finished]


@pytest.fixture
def stop_in_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`stop_in_step(2, signal.SIGTERM)` sends the signal while that step is computed."""
    from library.training.loop.update import Updates

    def arrange(number: int, name: int) -> None:
        honest = Updates.take

        def step(updates: Updates, window: Any, losses: Any) -> None:
            if window.step + 1 == number:
                os.kill(os.getpid(), name)
            honest(updates, window, losses)

        monkeypatch.setattr(Updates, "take", step)

    return arrange


@pytest.mark.parametrize(("name", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_status_tells_the_signal_when_asked_for(
    train: Train, base_arguments: list[str], tmp_path: Path, stop_in_step: Any, name: int, status: int
) -> None:
    stop_in_step(2, name)
    assert train([*base_arguments, "--exit_status_on_stop"]).status == status
    assert list((tmp_path / "out").glob("mine*state"))
    assert list((tmp_path / "out").glob("mine*.safetensors"))


def test_without_the_option_a_saved_run_ends_with_0(train: Train, base_arguments: list[str], stop_in_step: Any) -> None:
    stop_in_step(2, signal.SIGTERM)
    assert train(base_arguments).status == 0


def test_a_signal_in_the_last_step_finds_a_run_that_is_over(
    train: Train, base_arguments: list[str], stop_in_step: Any
) -> None:
    stop_in_step(4, signal.SIGTERM)
    assert train([*base_arguments, "--exit_status_on_stop"]).status == 0
