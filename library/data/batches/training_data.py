"""What a run asks of its data, wherever the batches come from."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from library.data.batches.validation_set import ValidationSet
from library.data.description.schema import RunDataConfig
from library.options.train import TrainOptions
from library.types import Batch


class TrainingData(Protocol):
    """Batches as a function of the seed, the epoch and the place in it, and what is said of them."""

    config: RunDataConfig

    @property
    def num_batches(self) -> int:
        """Batches in an epoch."""
        ...

    @property
    def batch_sizes(self) -> list[int]: ...
    @property
    def num_train_images(self) -> int: ...
    @property
    def num_reg_images(self) -> int: ...
    @property
    def identity(self) -> dict[str, Any]:
        """What the data is, in a few words that two runs can compare."""
        ...

    @property
    def identity_with_contents(self) -> dict[str, Any]:
        """The same with a digest of each picture."""
        ...

    @property
    def picture_paths(self) -> list[str]: ...
    @property
    def validation(self) -> ValidationSet: ...

    def batches(
        self,
        epoch: int,
        places: Sequence[int],
        step_of: Callable[[int], int],
        num_workers: int,
        persistent_workers: bool,
    ) -> Iterator[Batch]:
        """The batches of an epoch (from 1) at `places` (from 0), in their order."""
        ...

    def audit(self, log: logging.Logger) -> None: ...
    def facts(self) -> dict[str, Any]:
        """What was found, as plain values; see library/data/description/facts.py."""
        ...

    def metadata(self, options: TrainOptions, num_processes: int = 1) -> dict[str, Any]: ...
    def limit_to_largest_batch(self) -> int: ...
    def report_skipped(self, log: logging.Logger) -> None: ...
    def close(self) -> None: ...
