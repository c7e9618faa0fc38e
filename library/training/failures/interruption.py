"""SIGINT, SIGTERM, SIGHUP and SIGBREAK: the current step is finished, then the run saves and ends."""

import logging
import os
import signal
import threading
import time
from collections.abc import Mapping
from types import FrameType
from typing import Any

from library.base.launcher import DRIVER

logger = logging.getLogger(__name__)


def list_stop_signals(available: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the signals that ask a run to end, among those that `available`, the names of `signal`, has.

    Windows has no SIGHUP. Its SIGBREAK (Ctrl-Break) is the only one that another program can send to a run alone.
    """
    return tuple(available[name] for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if name in available)


HANGUP = vars(signal).get("SIGHUP")  # sent when a terminal or connection closes; not on all systems
STOP_SIGNALS = list_stop_signals(vars(signal))
POLL_S = 0.5
GRACE_S = 5.0  # seconds for the main thread to return from code in which Python runs no handlers


class Interrupted(BaseException):
    """The user stopped the run before training began; nothing needs saving.

    Like KeyboardInterrupt it is no Exception: the code that a signal meets, such as an import by diffusers, would take
    it for an error of its own.
    """


class Interruption:
    """Handles requests to stop the run.

    Until `defer()` is called, the first signal raises Interrupted at once; loading and caching leave no half-written
    file. Afterwards the first signal only sets `is_requested`, which the loop checks after each step. The second signal
    always stops the run, except for SIGHUP, which a closing terminal may send several times. A run started by
    `accelerate launch` or --sweep also stops when its launcher is gone, because nobody else would signal it.

    Until `defer()` a thread watches: while a process waits for others inside torch, Python runs no handlers, so an
    unanswered signal ends the process from that thread.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._is_deferred = False
        self._is_over = False
        # `accelerate launch` and --sweep set these variables in every process that they start.
        is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ or DRIVER in os.environ
        self._launcher = os.getppid() if is_launched else None

    def install(self) -> None:
        """Install the signal handlers; SIGHUP stays ignored if it is, as under nohup."""
        for number in STOP_SIGNALS:
            if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)
        if os.name == "posix":  # other systems cannot poll a pipe
            reader, writer = os.pipe()
            for end in (reader, writer):
                # Python requires it of the writing end; the thread polls the reading end.
                os.set_blocking(end, False)
            signal.set_wakeup_fd(writer)  # written at once, wherever the main thread is
            threading.Thread(target=self._watch, args=(reader, writer), daemon=True).start()

    def defer(self) -> None:
        """From now on, delay signals until the end of the step."""
        self._is_deferred = True
        self.disarm()

    def disarm(self) -> None:
        """End the watching thread, and restore the previous signal handlers."""
        self._is_over = True
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)

    def _watch(self, reader: int, writer: int) -> None:
        """End the process if a signal is not handled in time; send one if the launcher is gone."""
        deadline, number, is_reported = float("inf"), 0, False
        while not self._is_over:
            time.sleep(POLL_S)
            if self._is_over:  # the loop checks `is_requested`; a signal would be the second
                break
            try:
                stop_signals = [n for n in os.read(reader, 64) if n in STOP_SIGNALS]
            except BlockingIOError:
                stop_signals = []
            if stop_signals and not number:
                deadline, number = time.monotonic() + GRACE_S, stop_signals[0]
            if self._launcher is not None and os.getppid() != self._launcher and not is_reported:
                is_reported = True
                logger.warning("the launcher of this run is gone before the first step; ending")
                os.kill(os.getpid(), signal.SIGTERM)
            if time.monotonic() > deadline and not self._is_over:
                name = signal.Signals(number).name
                logger.error("%s received while others were waited for: nothing was trained, nothing to save", name)
                # `os._exit` skips all clean-up, and `sys.exit` would end this thread alone.
                logging.shutdown()
                os._exit(128 + number)
        os.close(reader)
        os.close(writer)

    @property
    def is_requested(self) -> bool:
        """Return True if the run should save and end."""
        if self._signal is None and self._launcher is not None and os.getppid() != self._launcher:
            logger.warning("the launcher of this run is gone; saving and ending")
            self._signal = signal.SIGTERM
        return self._signal is not None

    @property
    def exit_status(self) -> int:
        """The exit status of a process ended by a signal, as shells define it: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + (self._signal or signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == HANGUP:
            return
        if self._signal is not None:
            # By its default action the process ends with the status that shells expect of the signal.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._signal = number
        name = signal.Signals(number).name
        if not self._is_deferred:
            raise Interrupted(name)
        logger.warning("%s received: finishing this step and saving; a second signal stops immediately", name)
