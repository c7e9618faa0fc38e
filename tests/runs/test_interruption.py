"""Signals before the first step, also while the main thread waits inside torch for other processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from library.training.failures.interruption import Interruption
from tests.running import ROOT, Finished

pytestmark = pytest.mark.skipif(os.name != "posix", reason="other systems have other signals")

WAITS = """
import logging, sys
from datetime import timedelta
from pathlib import Path
from torch.distributed import TCPStore
from library.training.failures.interruption import Interruption
logging.basicConfig()
interruption = Interruption()
interruption.install()
store = TCPStore("127.0.0.1", 0, 1, True, timeout=timedelta(minutes=5))
Path(sys.argv[1]).touch()
store.get("what no process sets")
"""


def start_waiting_process(tmp_path: Path, *before: str, **environment: str) -> subprocess.Popen[str]:
    """Start a process and return it once it waits in torch's store."""
    command = [*before, sys.executable, "-c", WAITS, str(tmp_path / "waits")]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    for _ in range(600):
        if (tmp_path / "waits").exists():
            return process
        time.sleep(0.1)
    raise AssertionError("it did not come to wait")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.nightly)]
)
def test_a_signal_ends_a_process_that_waits_for_others(tmp_path: Path, number: int, status: int) -> None:
    """The store would wait for five minutes, during which Python calls no signal handler."""
    process = start_waiting_process(tmp_path)
    process.send_signal(number)
    _, log = process.communicate(timeout=30)
    assert process.returncode == status
    assert "received while others were waited for: nothing was trained, nothing to save" in log


@pytest.mark.nightly
def test_a_killed_launcher_leaves_no_orphaned_process(tmp_path: Path) -> None:
    launcher = start_waiting_process(tmp_path, "sh", "-c", '"$@" & wait', "sh", ACCELERATE_MIXED_PRECISION="no")
    launcher.kill()
    _, log = launcher.communicate(timeout=30)  # the pipe closes once the child process has ended
    assert "the launcher of this run is gone before the first step" in log


def test_once_training_has_begun_only_the_loop_reacts_to_a_lost_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watching thread may wake after training began: its signal would be the second, which stops at once."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    interruption = Interruption()
    sent: list[tuple[int, ...]] = []
    launcher = os.getppid()
    reader, writer = os.pipe()
    os.set_blocking(reader, False)

    def begin_training(_: float) -> None:
        interruption.defer()
        monkeypatch.setattr(os, "getppid", lambda: launcher + 1)
        assert interruption.is_requested

    monkeypatch.setattr("library.training.failures.interruption.time.sleep", begin_training)
    monkeypatch.setattr(os, "kill", lambda *signal_arguments: sent.append(signal_arguments))
    interruption._watch(reader, writer)
    monkeypatch.undo()
    assert sent == []


@pytest.mark.parametrize("met", ["transformers.CLIPTokenizer.from_pretrained", "torch.optim.AdamW.step"])
def test_a_signal_is_not_taken_for_an_error_of_the_code_that_it_meets(
    train: Callable[..., Finished], base_arguments: list[str], monkeypatch: pytest.MonkeyPatch, met: str
) -> None:
    """Both calls stand in a `try` that turns any exception into a message about the tokenizer or the optimizer."""

    def interrupt(*arguments: Any, **keywords: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(met, interrupt)
    done = train([*base_arguments, "--optimizer_args", "eps=1e-7"])
    assert done.status == 130
    assert "SIGINT received before the first step: nothing was trained, nothing to save" in done.stderr
    assert "ERROR" not in done.stderr
