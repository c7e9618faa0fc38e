"""The processes of a sweep: one run after the other, each of which saves itself when it is stopped."""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from library.base.errors import error_in
from library.base.launcher import DRIVER
from library.training.failures.interruption import HANGUP, STOP_SIGNALS
from library.training.sweep.commands import environment_of_runs

logger = logging.getLogger(__name__)

MOST_SIGNALS = 3  # the run ends by itself after the first, at once after the second
# Ctrl-C and, on Windows, Ctrl-Break: a terminal sends them to the run, too, which would count them twice.
OF_TERMINALS = tuple(vars(signal)[name] for name in ("SIGINT", "SIGBREAK") if hasattr(signal, name))


class Children:
    """Starts runs, and passes signals on to the one that is running."""

    def __init__(self) -> None:
        self._running: subprocess.Popen[bytes] | None = None
        self._num_signals = 0
        self.signal: int | None = None  # the first that was received

    @property
    def is_stopped(self) -> bool:
        """True if no further run is to be started."""
        return self.signal is not None

    @contextmanager
    def receiving_signals(self) -> Iterator[None]:
        """Handle signals inside the block. A program that calls a trainer from another thread keeps its own."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number in STOP_SIGNALS:
            if number != HANGUP or before[number] != signal.SIG_IGN:  # as under nohup
                signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self, words: Sequence[str]) -> int:
        """Run a command, and return its exit status, as shells define it."""
        sys.stdout.flush()
        environment = {**environment_of_runs(os.environ), DRIVER: str(os.getpid())}
        try:
            self._running = subprocess.Popen(words, env=environment)
        except OSError as error:
            raise error_in("--launcher")(f"--launcher: {words[0]} cannot be started: {error.strerror}") from error
        try:
            status = self._running.wait()
        finally:
            self._running = None
        return status if status >= 0 else 128 - status

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._num_signals += 1
        if self.signal is None:
            self.signal = number
            logger.warning("%s received: the sweep ends once the run that is training is saved", name_of(number))
        running: Any = self._running
        if self._num_signals >= MOST_SIGNALS:
            if running is not None:
                running.kill()
            os._exit(128 + number)
        if running is not None and number not in OF_TERMINALS:
            running.send_signal(number)


def name_of(number: int) -> str:
    return signal.Signals(number).name
