"""The signals that a run answers by saving, on each system."""

import os
import signal

import pytest

from library.training.failures import interruption as module
from library.training.failures.interruption import Interruption, list_stop_signals

POSIX = {"SIGINT": 2, "SIGTERM": 15, "SIGHUP": 1, "SIGKILL": 9}
WINDOWS = {"SIGINT": 2, "SIGTERM": 15, "SIGBREAK": 21, "CTRL_BREAK_EVENT": 1}


def test_each_system_has_its_signals() -> None:
    assert list_stop_signals(POSIX) == (2, 15, 1)
    assert list_stop_signals(WINDOWS) == (2, 15, 21)


@pytest.mark.skipif(os.name != "posix", reason="SIGUSR1 stands for SIGBREAK")
def test_ctrl_break_saves_as_ctrl_c_does(
    fresh_process: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Windows sends it to one process group, such as that of a job in a queue."""
    former = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(module, "HANGUP", None)
    monkeypatch.setattr(module, "STOP_SIGNALS", list_stop_signals({**WINDOWS, "SIGBREAK": signal.SIGUSR1}))
    interruption = Interruption()
    interruption.install()
    interruption.defer()
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert interruption.is_requested and interruption.exit_status == 128 + signal.SIGUSR1
    assert "received: finishing this step and saving" in caplog.text
