"""How many steps a run takes, and which step a batch belongs to.

A step is an optimizer step. A window is the batches that one step averages: `accumulation` of them, fewer at the end
of an epoch where they run out.
"""

from dataclasses import dataclass
from math import ceil

from library.options.run import RunOptions


@dataclass(frozen=True)
class Plan:
    """The shape of a run."""

    num_batches: int  # in an epoch
    accumulation: int  # batches of one full window
    max_train_steps: int

    @classmethod
    def build(cls, options: RunOptions, num_batches: int) -> "Plan":
        """The plan of a run whose epochs have `num_batches`."""
        return cls(num_batches, options.gradient_accumulation_steps, options.planned_steps(num_batches))

    @property
    def steps_per_epoch(self) -> int:
        return ceil(self.num_batches / self.accumulation)

    @property
    def num_epochs(self) -> int:
        return ceil(self.max_train_steps / self.steps_per_epoch)

    def step_of(self, epoch: int, index: int) -> int:
        """Steps finished before batch `index` (from 0) of `epoch` (from 1) is used."""
        return (epoch - 1) * self.steps_per_epoch + index // self.accumulation

    def batch_number(self, epoch: int, index: int) -> int:
        """The place of a batch in the whole run, from 0."""
        return (epoch - 1) * self.num_batches + index

    def window_size(self, index: int) -> int:
        """Batches of the window that batch `index` of an epoch belongs to."""
        first = index - index % self.accumulation
        return min(self.accumulation, self.num_batches - first)

    def ends_window(self, index: int) -> bool:
        """Whether an optimizer step follows batch `index` of an epoch."""
        return (index + 1) % self.accumulation == 0 or index + 1 == self.num_batches
