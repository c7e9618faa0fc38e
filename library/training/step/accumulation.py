"""The number of optimizer steps of a run, and the batches that each step accumulates.

A window holds the batches of one optimizer step over all processes: `accumulation` per process, or fewer at the end of
an epoch. Two processes with two batches each see the same window as one process with four.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from library.options.training.run import RunOptions


@dataclass(frozen=True)
class Window:
    """The batches of one optimizer step."""

    step: int  # steps finished before this one
    epoch: int  # from 1
    batch_indices: range  # in the epoch, from 0
    ends_epoch: bool

    def share(self, rank: int, num_processes: int) -> range:
        """Return the indices of the batches that one process computes; empty if the last window of an epoch is shorter
        than the group."""
        # Strided, so that `Processes.exchange` can put the losses of all processes in the order of the window.
        return self.batch_indices[rank::num_processes]

    def padding_batch(self, rank: int, num_processes: int) -> int | None:
        """Return the padding batch of a rank that has one batch fewer, so that all ranks run the same collectives.

        Another rank computes the same batch, so no other parameter of an adapter receives a gradient.
        """
        largest_share = ceil(len(self.batch_indices) / num_processes)
        return None if len(self.share(rank, num_processes)) == largest_share else self.batch_indices[-1]


@dataclass(frozen=True)
class StepPlan:
    """The shape of a run."""

    num_batches: int  # in an epoch
    accumulation: int  # batches of one full window, over all processes
    max_train_steps: int

    @classmethod
    def build(cls, options: RunOptions, num_batches: int, num_processes: int = 1) -> "StepPlan":
        """Build the plan of a run whose epochs have `num_batches` over all processes."""
        accumulation = options.gradient_accumulation_steps * num_processes
        return cls(num_batches, accumulation, options.planned_steps(num_batches, num_processes))

    @property
    def steps_per_epoch(self) -> int:
        return ceil(self.num_batches / self.accumulation)

    @property
    def num_epochs(self) -> int:
        return ceil(self.max_train_steps / self.steps_per_epoch)

    def epoch_of(self, step: int) -> int:
        """Return the epoch, from 1, of the step that follows `step` finished ones."""
        return step // self.steps_per_epoch + 1

    def epochs(self, first_step: int) -> range:
        """Return the epochs that remain after `first_step` finished steps."""
        return range(self.epoch_of(first_step), self.num_epochs + 1)

    def windows(self, epoch: int, first_step: int) -> Iterator[Window]:
        """Yield the windows of an epoch that follow `first_step` finished steps, up to the end of the run."""
        epoch_start = (epoch - 1) * self.steps_per_epoch
        for step in range(max(epoch_start, first_step), min(epoch_start + self.steps_per_epoch, self.max_train_steps)):
            first = (step - epoch_start) * self.accumulation
            last = min(first + self.accumulation, self.num_batches)
            yield Window(step, epoch, range(first, last), last == self.num_batches)

    def step_of(self, epoch: int, batch_index: int) -> int:
        """Return the number of steps finished before batch `batch_index` (from 0) of `epoch` (from 1) is used."""
        return (epoch - 1) * self.steps_per_epoch + batch_index // self.accumulation

    def batch_number(self, epoch: int, batch_index: int) -> int:
        """Return the number of a batch in the whole run, from 0."""
        return (epoch - 1) * self.num_batches + batch_index
