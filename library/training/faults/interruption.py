"""SIGINT and SIGTERM: the step in hand is finished, then the run saves and ends."""

import logging
import os
import signal
from types import FrameType

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """The user asked to stop before training began; there is nothing to save."""


class Interruption:
    """Remembers that someone asked the run to stop.

    Until `defer()` is called the first signal raises Interrupted at once; loading and caching leave no half-written
    file. Afterwards the first signal only sets `is_requested`, which the loop reads after each step. The second always
    stops.
    A run that `accelerate launch` started also stops when its launcher is gone, since nobody else would tell it.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._is_deferred = False
        self._launcher = os.getppid() if "ACCELERATE_MIXED_PRECISION" in os.environ else None

    def install(self) -> None:
        """Take over SIGINT and SIGTERM."""
        signal.signal(signal.SIGINT, self._receive)
        signal.signal(signal.SIGTERM, self._receive)

    def defer(self) -> None:
        """From here on a signal waits for the end of the step."""
        self._is_deferred = True

    @property
    def is_requested(self) -> bool:
        """Whether the run should save and end."""
        if self._signal is None and self._launcher is not None and os.getppid() != self._launcher:
            logger.warning("the launcher of this run is gone; saving and ending")
            self._signal = signal.SIGTERM
        return self._signal is not None

    @property
    def exit_status(self) -> int:
        """What shells know a process by that a signal ended: 130 after SIGINT, 143 after SIGTERM."""
        return 128 + (self._signal or signal.SIGTERM)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._signal = number
        name = signal.Signals(number).name
        if not self._is_deferred:
            raise Interrupted(name)
        logger.warning("%s received: finishing the step, then saving; once more to stop at once", name)
