"""The result of a step, once that is known."""

from dataclasses import dataclass

from library.training.reporting.console_lines import LimitedNorms
from library.training.step.accumulation import Window


@dataclass(frozen=True)
class StepResult:
    """The result of a step."""

    window: Window
    losses: list[float]  # of its batches, in their order
    norm: float  # of the whole gradient, before it was clipped
    rates: list[float]  # the learning rate of each group of the optimizer
    limited: LimitedNorms | None
