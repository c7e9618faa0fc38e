"""The record that the adapters of a sweep share and their states keep."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

PART = "sweep"  # of the states of adapters
NOT_FINITE = "its losses were not finite"


@dataclass(frozen=True)
class Ended:
    """An adapter that ended before the others."""

    step: int
    why: str
    losses_G: Sequence[float] | None  # of each image that is set aside, at its last validation


@dataclass
class SweepRecord:
    """The seed of what all share, and who has ended; every state of an adapter has it."""

    seed: int
    ended: dict[str, Ended] = field(default_factory=dict)  # by label

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed, "ended": {label: asdict(one) for label, one in self.ended.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Nothing: the record was read before the adapters were made, `of` does that."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "SweepRecord":
        """Read what `state_dict` gave."""
        return cls(int(values["seed"]), {label: Ended(**one) for label, one in values["ended"].items()})
