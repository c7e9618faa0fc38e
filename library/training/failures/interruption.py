"""SIGINT, SIGTERM and SIGHUP: the step in hand is finished, then the run saves and ends."""

import logging
import os
import signal
import sys
import threading
import time
from types import FrameType

logger = logging.getLogger(__name__)

# sent by a terminal or connection that closes; other systems have no such signal
HANGUP = None if sys.platform == "win32" else signal.SIGHUP
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM) if HANGUP is None else (signal.SIGINT, signal.SIGTERM, HANGUP)
POLL_S = 0.5
GRACE_S = 5.0  # for the main thread to come back from where Python runs no handlers


class Interrupted(Exception):
    """The user asked to stop before training began; there is nothing to save."""


class Interruption:
    """Remembers that someone asked the run to stop.

    Until `defer()` is called the first signal raises Interrupted at once; loading and caching leave no half-written
    file. Afterwards the first signal only sets `is_requested`, which the loop reads after each step. The second always
    stops, unless it is SIGHUP: a terminal that closes may send several, from the shell and from the system.
    A run that `accelerate launch` started also stops when its launcher is gone, since nobody else would tell it.

    Until `defer()` a thread looks on: while a process waits for others, inside torch, Python runs no handlers, so a
    signal that is not answered soon ends the process from there.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._is_deferred = False
        self._is_over = False
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None

    def install(self) -> None:
        """Take over the signals that stop a run, but leave SIGHUP ignored where it is, as under nohup."""
        for number in STOP_SIGNALS:
            if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._receive)
        if os.name == "posix":  # elsewhere a pipe cannot be looked into without waiting
            reader, writer = os.pipe()
            for end in (reader, writer):
                os.set_blocking(end, False)
            signal.set_wakeup_fd(writer)  # written to at once, wherever the main thread is
            threading.Thread(target=self._watch, args=(reader, writer), daemon=True).start()

    def defer(self) -> None:
        """From here on a signal waits for the end of the step."""
        self._is_deferred = True
        self.disarm()

    def disarm(self) -> None:
        """Let the thread that looks on end; signals are handled as before."""
        self._is_over = True
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)

    def _watch(self, reader: int, writer: int) -> None:
        """End the process where a signal is not answered, and send one where the launcher is gone."""
        ends_at, number, is_reported = float("inf"), 0, False
        while not self._is_over:
            time.sleep(POLL_S)
            if self._is_over:  # training has begun: the loop asks `is_requested`, and a signal would be the second
                break
            try:
                stops = [n for n in os.read(reader, 64) if n in STOP_SIGNALS]
            except BlockingIOError:
                stops = []
            if stops and not number:
                ends_at, number = time.monotonic() + GRACE_S, stops[0]
            if self._launcher is not None and os.getppid() != self._launcher and not is_reported:
                is_reported = True
                logger.warning("the launcher of this run is gone before the first step; ending")
                os.kill(os.getpid(), signal.SIGTERM)
            if time.monotonic() > ends_at and not self._is_over:
                name = signal.Signals(number).name
                logger.error("%s received while others were waited for: nothing was trained, nothing to save", name)
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
        """The status of a process that a signal ended, as shells know it: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + (self._signal or signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None and number == HANGUP:
            return
        if self._signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._signal = number
        name = signal.Signals(number).name
        if not self._is_deferred:
            raise Interrupted(name)
        logger.warning("%s received: finishing the step, then saving; once more to stop at once", name)
