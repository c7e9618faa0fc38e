"""The record shared by the adapters of a sweep and stored in their states."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

PART = "sweep"  # its name in an adapter's state
NOT_FINITE = "its losses were not finite"


@dataclass(frozen=True)
class Ended:
    """An adapter that ended before the others."""

    step: int
    why: str
    losses_G: Sequence[float] | None  # of each held-out image, at its last validation


@dataclass
class SweepRecord:
    """The shared seed of a sweep, and the adapters that have ended; part of every adapter's state."""

    seed: int
    ended: dict[str, Ended] = field(default_factory=dict)  # by label

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "ended": {label: asdict(adapter) for label, adapter in self.ended.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Do nothing: `of` has read the record before the adapters are built."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "SweepRecord":
        """Build a record from a state dict."""
        return cls(int(values["seed"]), {label: Ended(**fields) for label, fields in values["ended"].items()})
