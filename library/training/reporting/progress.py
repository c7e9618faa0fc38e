"""A run's progress: what a state stores besides weights and optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import fsum, isfinite, nan
from typing import Any, Literal

Part = Literal["step", "step previews", "epoch", "epoch previews", "end"]
"""Work that may be scheduled after a step: saving and previews of the step and of the epoch, and the final file."""


@dataclass
class LossAverage:
    """The running mean of the latest losses of all batch positions of an epoch."""

    losses: dict[int, float] = field(default_factory=dict)
    total: float = 0.0

    def add(self, batch_index: int, loss: float) -> None:
        """Replace the loss of a batch."""
        self.total += loss - self.losses.get(batch_index, 0.0)
        self.losses[batch_index] = loss
        if not isfinite(self.total):  # a running sum would stay NaN after the NaN is replaced
            self.total = fsum(self.losses.values())

    def keep_batches_below(self, num_batches: int) -> None:
        """Drop the losses of positions at and above `num_batches`."""
        if any(batch_index >= num_batches for batch_index in self.losses):
            self.losses = {batch_index: loss for batch_index, loss in self.losses.items() if batch_index < num_batches}
            self.total = fsum(self.losses.values())

    @property
    def mean(self) -> float:
        return self.total / len(self.losses) if self.losses else nan


@dataclass
class Progress:
    """The position of a run: the only counter of optimizer steps, and the running average of the loss."""

    step: int = 0  # finished optimizer steps
    average: LossAverage = field(default_factory=LossAverage)
    is_updating: bool = False  # True while the optimizer updates the weights, which then belong to no step
    done: set[Part] = field(default_factory=set)  # finished work scheduled after `step`
    stops: list[int] = field(default_factory=list)  # steps after which a stopped run was saved, until rotated
    ended: str = ""  # why validation ended the run early

    def advance(self) -> None:
        """Count a step and clear the work done after the previous one."""
        self.step += 1
        self.is_updating = False
        self.done.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return plain values; floats survive JSON unchanged. A state stores `done` itself."""
        average = self.average
        return {"step": self.step, "losses": dict(average.losses), "total": average.total, "stops": list(self.stops)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the position of a state."""
        self.step = int(state_dict["step"])
        self.average = LossAverage(dict(state_dict["losses"]), float(state_dict["total"]))
        self.stops = [int(step) for step in state_dict.get("stops", ())]  # older states have none
