"""The options of a run once everything that decides them has been asked."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from library.options.train import TrainOptions

OptionsT = TypeVar("OptionsT", bound=TrainOptions)


@dataclass(frozen=True)
class ResolvedOptions(Generic[OptionsT]):
    """The options of what all adapters share, and those of each adapter.

    The launcher, the processes, the states and the planner override values on the way, each in both.
    """

    shared: OptionsT  # of the base model, the data and the loop
    adapters: Mapping[str, OptionsT]  # by label; one of label "" without a sweep

    def with_values(self, values: Mapping[str, Any]) -> "ResolvedOptions[OptionsT]":
        """Override options by name."""
        if not values:
            return self
        adapters = {label: own.with_values(values) for label, own in self.adapters.items()}
        return ResolvedOptions(self.shared.with_values(values), adapters)
