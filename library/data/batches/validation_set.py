"""The pictures that are set aside, as batches that are the same every time."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from library.data.batches.batches import BatchMaker, BatchOrder, PartialBatch
from library.data.caching.stores import CacheFiles
from library.data.plan.order import plain_batches
from library.data.plan.samples import Draws, Sample, Samples
from library.types import Batch


@dataclass(frozen=True)
class ValidationSet:
    """Every picture once, one bucket after another, in an order that follows from the contents of the pictures.

    Nothing is left to chance, and nothing depends on what files and folders are called.
    """

    maker: BatchMaker  # its seed is that of validation: wildcards of captions are drawn from it, once for all
    finish: Callable[[PartialBatch | str], Batch]  # adds what is kept in memory
    draws: tuple[tuple[int, ...], ...]  # of each batch
    identities: Mapping[str, str]  # path of a picture -> a digest of its content

    @property
    def num_pictures(self) -> int:
        """Pictures of all batches; one that two datasets measure counts twice."""
        return sum(len(draws) for draws in self.draws)

    @property
    def num_batches(self) -> int:
        return len(self.draws)

    def places_of(self, count: int | None) -> list[int]:
        """At most `count` batches (None: all), spread evenly over all of them, so that each bucket has its share."""
        if count is None or count >= self.num_batches:
            return list(range(self.num_batches))
        return [i * self.num_batches // count for i in range(count)]

    def names(self, place: int) -> list[tuple[str | int, ...]]:
        """What identifies each picture of a batch, whatever its file is called: its content, width and height."""
        samples = [self._sample(draw) for draw in self.draws[place]]
        return [(self.identities[sample.picture.key], *sample.shape.bucket) for sample in samples]

    def labels(self, place: int) -> list[str]:
        """How messages call each picture of a batch: folder and file."""
        paths = [self._sample(draw).picture.key for draw in self.draws[place]]
        # ascii: a file name may hold bytes that are no text
        return [ascii(os.path.join(*os.path.abspath(path).split(os.sep)[-2:])) for path in paths]

    def _sample(self, draw: int) -> Sample:
        return self.maker.samples[int(self.maker.sample_of_draw[draw])]

    def batches(self, places: Sequence[int], num_threads: int) -> Iterator[Batch]:
        """The batches at `places`; `num_threads` read ahead, one batch each, where 0 reads when asked.

        Raises UserError naming a picture that cannot be read.
        """
        if num_threads == 0 or all(sample in self.maker.in_memory for sample in self.samples_of(places)):
            for place in places:
                yield self.finish(self.maker[self._order(place)])
            return
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="validation")
        try:
            waiting: deque[Future[PartialBatch | str]] = deque()
            for place in places:
                waiting.append(pool.submit(self.maker.__getitem__, self._order(place)))
                if len(waiting) > num_threads:
                    yield self.finish(waiting.popleft().result())
            while waiting:
                yield self.finish(waiting.popleft().result())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def samples_of(self, places: Sequence[int]) -> Iterator[int]:
        """The numbers of the samples in the batches at `places`."""
        return (int(self.maker.sample_of_draw[draw]) for place in places for draw in self.draws[place])

    def _order(self, place: int) -> BatchOrder:
        return BatchOrder(epoch=1, step=0, draws=self.draws[place])


def nothing_aside() -> ValidationSet:
    """No picture."""
    empty: Any = ()
    maker = BatchMaker(
        seed=0, samples=Samples(), sample_of_draw=empty, subsets=(), prior_loss_weight=1.0, max_train_steps=1,
        files=CacheFiles(), in_memory=frozenset(),
    )  # fmt: skip
    finish: Any = None  # there is nothing to finish
    return ValidationSet(maker, finish, (), {})


def open_validation_set(
    maker: BatchMaker, finish: Callable[[PartialBatch | str], Batch], draws: Draws, identities: Mapping[str, str]
) -> ValidationSet:
    """The pictures that `draws` has, numbered anew by their contents; copies of one come in the order of captions."""

    def key(draw: int) -> tuple[str, str]:
        picture = maker.samples[int(draws.sample_of_draw[draw])].picture
        return identities[picture.key], picture.caption

    order = sorted(range(len(draws.sample_of_draw)), key=key)
    number_of = {draw: number for number, draw in enumerate(order)}
    buckets = [replace(b, draws=sorted(number_of[int(draw)] for draw in b.draws)) for b in draws.buckets]
    numbered = replace(maker, sample_of_draw=draws.sample_of_draw[order])
    return ValidationSet(numbered, finish, plain_batches(buckets), identities)
