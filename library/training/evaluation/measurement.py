"""A validation measurement: fixed images, noise and noise levels.

Letters: N images, L noise levels.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from math import ceil

import torch
from torch import Tensor

from library.base.progress import progress_bar
from library.data.batches.validation_set import ValidationSet
from library.processes.process_group import Processes
from library.training.evaluation.validation_loss import Name, batch_losses
from library.training.step.context import StepContext


@dataclass(frozen=True)
class Measurement:
    """Held-out images, the noise levels to measure, and the seed of the noise."""

    images: ValidationSet
    batch_indices: Sequence[int]  # indices of the batches to measure
    levels: Sequence[int]
    seed: int
    noise: Sequence[Name] | None = None  # the name that seeds each row's noise; None uses the image's own

    @cached_property
    def _names(self) -> list[list[Name]]:
        return [self.images.identify_images(i) for i in self.batch_indices]

    @cached_property
    def rows(self) -> list[Name]:
        """The name that identifies each row's image."""
        return [name for names in self._names for name in names]

    @property
    def fingerprint(self) -> str:
        """A digest of the images and settings."""
        return blake2b(repr((self.rows, self.levels, self.seed)).encode(), digest_size=16).hexdigest()

    @cached_property
    def labels(self) -> list[str]:
        """The name of each row's image in messages."""
        return [label for i in self.batch_indices for label in self.images.labels(i)]

    def losses(
        self,
        context: StepContext,
        processes: Processes,
        num_threads: int,
        title: str,
        evaluating: AbstractContextManager[None] | None = None,
    ) -> Tensor:
        """Return the losses of all images, shape NL, float64. Each process measures its share of the batches.

        `evaluating` puts the models into evaluation mode if they are not; `title` is that of the progress bar.
        """
        indices = list(range(processes.rank, len(self.batch_indices), processes.count))
        num_local = len(indices)
        if context.models.sharded is not None and num_local < ceil(len(self.batch_indices) / processes.count):
            indices.append(len(self.batch_indices) - 1)  # padding, to stay in step with other ranks
        names = self.rows if self.noise is None else self.noise
        # Rows that other ranks measure stay 0 here, so that the sum over all ranks collects them.
        losses_NL = torch.zeros(len(self.rows), len(self.levels), dtype=torch.float64)
        with evaluating or nullcontext(), progress_bar(title, len(indices), leave=False) as bar:
            batches = self.images.batches([self.batch_indices[i] for i in indices], num_threads)
            for position, (i, batch) in enumerate(zip(indices, batches, strict=True)):
                first = sum(map(len, self._names[:i]))
                rows = slice(first, first + len(batch.keys))
                losses = batch_losses(context, batch, names[rows], self.levels, self.seed)
                if position < num_local:
                    losses_NL[rows] = losses
                bar.update(1)
        return processes.sum_over_processes(losses_NL)
