"""The training data of a run: described images, a dataset class of the user's own, or prompts alone."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from library.data.batches.planned import PlannedBatches
from library.data.batches.validation_set import ValidationSet
from library.data.caching.stores import NO_LATENTS, NO_TEXTS, LatentStore, TextStore
from library.data.description.schema import RunDataConfig
from library.data.plan.data_plan import DataPlan
from library.options.dataset import DatasetOptions
from library.types import Batch


class TrainingBatches(Protocol):
    """Draws the batches of a run."""

    @property
    def validation(self) -> ValidationSet:
        """The images that are set aside."""

    def of_epoch(
        self,
        epoch: int,
        places: Sequence[int],
        step_of: Callable[[int], int],
        num_workers: int,
        persistent_workers: bool,
    ) -> Iterator[Batch]:
        """Yield the batches of an epoch (from 1) at `places` (from 0); `step_of(i)` is the step of batch i."""

    def report_skipped(self, log: logging.Logger) -> None:
        """Log how often damaged images were left out, if there were any."""

    def close(self) -> None:
        """End worker processes, also within an epoch."""


class BatchSizes(Protocol):
    """The batches of a run whose sizes are known before it."""

    @property
    def max_train_steps(self) -> int: ...
    def batch_shapes(self) -> Iterator[tuple[int, tuple[tuple[int, int], ...]]]:
        """Yield samples per batch and their size in pixels (width, height), then those of their references."""
        ...


class TrainingData(Protocol):
    """The facts of the data before any of it is drawn."""

    @property
    def config(self) -> RunDataConfig:
        """The description of the images; empty without images."""

    @property
    def num_batches(self) -> int:
        """Batches in an epoch."""

    @property
    def batch_sizes(self) -> list[int]: ...

    @property
    def num_train_images(self) -> int:
        """Training images in an epoch, repeats included."""

    @property
    def num_reg_images(self) -> int: ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """Plain values that two runs can compare."""

    @property
    def identity_with_contents(self) -> Mapping[str, Any]:
        """The identity, with a digest of each image's file where there are files."""

    @property
    def image_paths(self) -> list[str]: ...

    @property
    def image_plan(self) -> DataPlan | None:
        """The plan of images that can be cached and counted; None for a user's class and for prompts."""

    @property
    def sizes(self) -> BatchSizes | None:
        """The sizes of the batches; None for a user's class, which does not tell them."""

    @property
    def prompts(self) -> Sequence[str] | None:
        """Every prompt of a run without images, each once; None where there are images."""

    @property
    def own_batches(self) -> TrainingBatches | None:
        """The batches of data without a plan."""

    def facts(self) -> dict[str, Any]:
        """Return what the audit found, as plain values for programs."""

    def metadata(self, described: DatasetOptions, batches_per_step: int = 1) -> dict[str, Any]:
        """Describe the data as `ss_*` values of saved files."""

    def limited_to_largest_batch(self) -> tuple["TrainingData", int]:
        """Return what the largest batch needs, and its place in the first epoch."""


def open_batches(data: TrainingData, latents: LatentStore = NO_LATENTS, texts: TextStore = NO_TEXTS) -> TrainingBatches:
    """Open the batches of the data with its caches."""
    if data.image_plan is not None:
        return PlannedBatches(data.image_plan, latents, texts)
    assert data.own_batches is not None
    return data.own_batches
