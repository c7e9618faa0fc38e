"""How far a run has come: what a state must hold besides weights and optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import fsum, isfinite, nan
from typing import Any, Literal

Part = Literal["step", "step previews", "epoch", "epoch previews", "end"]
"""Actions that may be due after a step: saving and previews of the step and of the epoch, and the last file."""


@dataclass
class LossAverage:
    """The mean of the last loss of every batch place of an epoch: over the last epoch, always up to date."""

    losses: dict[int, float] = field(default_factory=dict)
    total: float = 0.0

    def add(self, place: int, loss: float) -> None:
        """Replace the loss of batch `place` of an epoch."""
        self.total += loss - self.losses.get(place, 0.0)
        self.losses[place] = loss
        if not isfinite(self.total):  # a running sum never recovers from one NaN; the average does once it is replaced
            self.total = fsum(self.losses.values())

    def keep_places_below(self, num_batches: int) -> None:
        """Forget losses of places that an epoch of `num_batches` does not have; else nothing changes."""
        if any(place >= num_batches for place in self.losses):
            self.losses = {place: loss for place, loss in self.losses.items() if place < num_batches}
            self.total = fsum(self.losses.values())

    @property
    def mean(self) -> float:
        return self.total / len(self.losses) if self.losses else nan


@dataclass
class Progress:
    """The place of a run: the one counter of optimizer steps, and the running average of the loss."""

    step: int = 0  # optimizer steps that are finished
    average: LossAverage = field(default_factory=LossAverage)
    is_moving: bool = False  # while the optimizer moves the weights, which then belong to no step
    done: set[Part] = field(default_factory=set)  # of what is due after `step`
    stops: list[int] = field(default_factory=list)  # steps after which the run was stopped and saved, until rotated
    ended: str = ""  # why the adapter has ended before the others of its run

    def advance(self) -> None:
        """Count a step; nothing of what is due after it is done."""
        self.step += 1
        self.is_moving = False
        self.done.clear()

    def state_dict(self) -> dict[str, Any]:
        """Plain values; JSON gives every float back as it was. A state keeps `done` for itself."""
        average = self.average
        return {"step": self.step, "losses": dict(average.losses), "total": average.total, "stops": list(self.stops)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Stand where `state_dict` was taken."""
        self.step = int(state_dict["step"])
        self.average = LossAverage(dict(state_dict["losses"]), float(state_dict["total"]))
        self.stops = [int(step) for step in state_dict.get("stops", ())]  # older states have none
