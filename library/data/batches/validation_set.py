"""The held-out images, as batches that are always the same."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from library.base.errors import UserError
from library.data.batches.batches import BatchMaker, BatchOrder, PartialBatch
from library.data.caching.stores import CacheFiles
from library.data.plan.order import plain_batches
from library.data.plan.samples import Draws, Sample, Samples
from library.types import Batch


@dataclass(frozen=True)
class ValidationSet:
    """Images to measure the loss on, each once per dataset, bucket by bucket, ordered by their contents.

    Nothing is random, and nothing depends on the names of files and folders.
    """

    maker: BatchMaker  # has the validation seed, from which wildcards of captions are drawn
    finish: Callable[[PartialBatch | UserError], Batch]  # adds features that are kept in memory
    draws: tuple[tuple[int, ...], ...]  # by batch
    identities: Mapping[str, str]  # image path -> digest of its content

    @property
    def num_images(self) -> int:
        """The number of images in all batches; an image of two datasets counts twice."""
        return sum(len(draws) for draws in self.draws)

    @property
    def num_batches(self) -> int:
        return len(self.draws)

    def select_batches(self, count: int | None) -> list[int]:
        """Return the indices of at most `count` batches (None: all), evenly spread."""
        if count is None or count >= self.num_batches:
            return list(range(self.num_batches))
        return [i * self.num_batches // count for i in range(count)]

    def identify_images(self, batch_index: int) -> list[tuple[str | int, ...]]:
        """Identify each image of a batch regardless of its file name: content digest, width and height."""
        samples = [self._sample(draw) for draw in self.draws[batch_index]]
        return [(self.identities[sample.image.key], *sample.shape.bucket) for sample in samples]

    def labels(self, batch_index: int) -> list[str]:
        """Name each image of a batch for messages: folder and file."""
        paths = [self._sample(draw).image.key for draw in self.draws[batch_index]]
        # Escaped, because a file name may contain bytes that are not text.
        return [ascii(os.path.join(*os.path.abspath(path).split(os.sep)[-2:])) for path in paths]

    def of_probe(self, is_probe: bool) -> "ValidationSet":
        """Return the images of subsets with `is_forgetting_probe`, or the other ones. Batches keep their order;
        empty ones are dropped."""
        parts = (tuple(draw for draw in draws if self._is_probe(draw) == is_probe) for draws in self.draws)
        return replace(self, draws=tuple(part for part in parts if part))

    def _is_probe(self, draw: int) -> bool:
        return self.maker.subsets[self._sample(draw).subset].is_forgetting_probe

    def _sample(self, draw: int) -> Sample:
        return self.maker.samples[int(self.maker.sample_of_draw[draw])]

    def batches(self, batch_indices: Sequence[int], num_threads: int) -> Iterator[Batch]:
        """Yield the batches at `batch_indices`. `num_threads` threads read ahead; 0 reads in this thread.

        Raises UserError naming an image that cannot be read.
        """
        if num_threads == 0 or all(sample in self.maker.in_memory for sample in self.iterate_samples(batch_indices)):
            for batch_index in batch_indices:
                yield self.finish(self.maker[self._order(batch_index)])
            return
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="validation")
        try:
            waiting: deque[Future[PartialBatch | UserError]] = deque()
            for batch_index in batch_indices:
                waiting.append(pool.submit(self.maker.__getitem__, self._order(batch_index)))
                if len(waiting) > num_threads:
                    yield self.finish(waiting.popleft().result())
            while waiting:
                yield self.finish(waiting.popleft().result())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def iterate_samples(self, batch_indices: Sequence[int]) -> Iterator[int]:
        return (int(self.maker.sample_of_draw[draw]) for i in batch_indices for draw in self.draws[i])

    def _order(self, batch_index: int) -> BatchOrder:
        return BatchOrder(epoch=1, step=0, draws=self.draws[batch_index])


def make_empty_set() -> ValidationSet:
    empty: Any = ()
    maker = BatchMaker(
        seed=0, samples=Samples(), sample_of_draw=empty, subsets=(), prior_loss_weight=1.0, max_train_steps=1,
        files=CacheFiles(), in_memory=frozenset(),
    )  # fmt: skip
    finish: Any = None  # never called
    return ValidationSet(maker, finish, (), {})


def open_validation_set(
    maker: BatchMaker, finish: Callable[[PartialBatch | UserError], Batch], draws: Draws, identities: Mapping[str, str]
) -> ValidationSet:
    """Build the validation set of the images in `draws`, ordered by content; copies of an image by caption."""

    def key(draw: int) -> tuple[str, str]:
        image = maker.samples[int(draws.sample_of_draw[draw])].image
        return identities[image.key], image.caption

    order = sorted(range(len(draws.sample_of_draw)), key=key)
    number_of = {draw: number for number, draw in enumerate(order)}
    buckets = [replace(b, draws=sorted(number_of[int(draw)] for draw in b.draws)) for b in draws.buckets]
    numbered = replace(maker, sample_of_draw=draws.sample_of_draw[order])
    return ValidationSet(numbered, finish, plain_batches(buckets), identities)
