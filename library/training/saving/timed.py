"""States that a run saves by the clock, so that a crash or a power cut costs minutes and not the run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

NUM_KEPT = 2
SECONDS = 60  # in a minute


@dataclass
class TimedStates:
    """When the next state of --save_every_n_minutes is due, and which of the earlier ones it outdates.

    The clock decides only when a state is written; no number of the run depends on it. Only the main process writes
    states, and nobody waits for that, so its clock alone decides.
    """

    every_minutes: float | None = None
    kept: list[str] = field(default_factory=list)  # names of folders, oldest first: known to be whole
    saved_at: float = field(default_factory=lambda: monotonic())
    saved_step: int = -1  # of the last state of any kind

    @property
    def is_due(self) -> bool:
        return self.every_minutes is not None and monotonic() - self.saved_at >= self.every_minutes * SECONDS

    def note_saved(self, step: int) -> None:
        """Count the time from now on, after a state of any kind: the next one is not due while it is as new."""
        self.saved_at, self.saved_step = monotonic(), step

    def outdate(self, newest: Path, all_states: Sequence[Path]) -> list[Path]:
        """Keep a new, whole state. Return those of `all_states` that it outdates.

        Nothing is outdated before two are known to be whole: those of an earlier start may be damaged, or of steps that
        this one has not reached.
        """
        self.kept = [*self.kept, newest.name][-NUM_KEPT:]
        return [path for path in all_states if path.name not in self.kept] if len(self.kept) == NUM_KEPT else []
