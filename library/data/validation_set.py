"""The pictures that are set aside, as batches that are the same every time."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from library.data.batches import BatchMaker, BatchOrder, Draft
from library.types import Batch


@dataclass(frozen=True)
class ValidationSet:
    """Every picture once, in the order of subsets and paths, one bucket after another; nothing is left to chance."""

    maker: BatchMaker  # its seed is that of validation: wildcards of captions are drawn from it, once for all
    finish: Callable[[Draft | str], Batch]  # adds what is kept in memory
    draws: tuple[tuple[int, ...], ...]  # of each batch

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
        """What identifies each picture of a batch, wherever the data lies: folder, name, width and height."""
        return [self._name(draw) for draw in self.draws[place]]

    def _name(self, draw: int) -> tuple[str | int, ...]:
        sample = self.maker.samples[int(self.maker.sample_of_draw[draw])]
        folder, name = os.path.split(os.path.abspath(sample.picture.path))
        # ascii: a file name may hold bytes that are no text
        return ascii(os.path.basename(folder)), ascii(name), *sample.shape.bucket

    def batches(self, places: Sequence[int], num_threads: int) -> Iterator[Batch]:
        """The batches at `places`; `num_threads` read ahead, one batch each, where 0 reads when asked.

        Raises ValueError naming a picture that cannot be read.
        """
        if num_threads == 0 or all(sample in self.maker.in_memory for sample in self._samples_of(places)):
            for place in places:
                yield self.finish(self.maker[self._order(place)])
            return
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="validation")
        try:
            waiting: deque[Future[Draft | str]] = deque()
            for place in places:
                waiting.append(pool.submit(self.maker.__getitem__, self._order(place)))
                if len(waiting) > num_threads:
                    yield self.finish(waiting.popleft().result())
            while waiting:
                yield self.finish(waiting.popleft().result())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _samples_of(self, places: Sequence[int]) -> Iterator[int]:
        return (int(self.maker.sample_of_draw[draw]) for place in places for draw in self.draws[place])

    def _order(self, place: int) -> BatchOrder:
        return BatchOrder(epoch=1, step=0, draws=self.draws[place])
