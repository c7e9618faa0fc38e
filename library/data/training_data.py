"""The training data of a run: described images, a user's dataset class, or prompts alone."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from library.data.batches.planned import PlannedBatches
from library.data.batches.validation_set import ValidationSet
from library.data.caching.stores import NO_LATENTS, NO_TEXTS, LatentStore, TextStore
from library.data.description.schema import RunDataConfig
from library.data.plan.data_plan import DataPlan
from library.options.dataset import DatasetOptions
from library.types import Batch, StepOf


class TrainingBatches(Protocol):
    """Protocol of the batches of a run."""

    @property
    def validation(self) -> ValidationSet:
        """The held-out images."""

    def iterate_epoch(
        self, epoch: int, batch_indices: Sequence[int], step_of: StepOf, num_workers: int, persistent_workers: bool
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch (from 1) at `batch_indices` (from 0); `step_of(i)` is the step of batch i."""

    def report_skipped(self, log: logging.Logger) -> None:
        """Log how often damaged images were skipped, if any."""

    def close(self) -> None:
        """End the worker processes, even in the middle of an epoch."""


class BatchSizes(Protocol):
    """Protocol of batches whose sizes are known before the run."""

    @property
    def max_train_steps(self) -> int: ...
    def batch_shapes(self) -> Iterator[tuple[int, tuple[tuple[int, int], ...]]]:
        """Yield (samples per batch, (image size, *reference sizes)) of each kind of batch; sizes are (width, height)
        in pixels."""
        ...


class TrainingData(Protocol):
    """Protocol of the training data: what is known before any of it is drawn."""

    @property
    def config(self) -> RunDataConfig:
        """The description of the images; empty if there are none."""

    @property
    def num_batches(self) -> int:
        """The number of batches per epoch."""

    @property
    def batch_sizes(self) -> list[int]: ...

    @property
    def num_train_images(self) -> int:
        """The number of training images per epoch, repeats included."""

    @property
    def num_reg_images(self) -> int: ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """Plain values that identify the data, so that two runs can compare it."""

    @property
    def identity_with_contents(self) -> Mapping[str, Any]:
        """The identity with a digest of each image file, if there are files."""

    @property
    def image_paths(self) -> list[str]: ...

    @property
    def image_plan(self) -> DataPlan | None:
        """The plan of images that can be cached and counted; None for a user's class and for prompts."""

    @property
    def sizes(self) -> BatchSizes | None:
        """The sizes of the batches; None for a user's class, whose sizes are unknown in advance."""

    @property
    def prompts(self) -> Sequence[str] | None:
        """All different prompts of a run without images; None if there are images."""

    @property
    def own_batches(self) -> TrainingBatches | None:
        """The batches of data that has no plan; None if it has one."""

    def audit_values(self) -> dict[str, Any]:
        """Return the results of the audit as plain values, for programs."""

    def metadata(self, described: DatasetOptions, batches_per_step: int = 1) -> dict[str, Any]:
        """Describe the data as `ss_*` values of saved files."""

    def limited_to_largest_batch(self) -> tuple["TrainingData", int]:
        """Return data restricted to the needs of the largest batch, and the index of that batch in the first epoch."""


def open_batches(data: TrainingData, latents: LatentStore = NO_LATENTS, texts: TextStore = NO_TEXTS) -> TrainingBatches:
    """Return the batches of the data, built with its caches if it has a plan."""
    if data.image_plan is not None:
        return PlannedBatches(data.image_plan, latents, texts)
    assert data.own_batches is not None
    return data.own_batches
