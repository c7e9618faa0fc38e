"""The order of draws and batches, as a function of the seed and the epoch."""

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from library.base.randomness import random_for
from library.data.scanned.columns import Column


@dataclass(frozen=True, eq=False)
class Bucket:
    """The draws of a dataset with the same sizes. A draw is a number; each repeat of an image has one."""

    dataset: int
    size: tuple[int, int]  # width, height
    batch_size: int
    draws: Sequence[int] | NDArray[np.int32]
    reference_sizes: tuple[tuple[int, int], ...] = ()  # one for each reference image

    @property
    def num_batches(self) -> int:
        return -(-len(self.draws) // self.batch_size)


@dataclass(frozen=True)
class EpochBatches(Column[tuple[int, ...]]):
    """The batches of an epoch, each a tuple of draws, stored in arrays: at most two numbers per draw, no objects."""

    draws: "array[int]"  # bucket by bucket, shuffled within each
    starts: "array[int]"  # of each batch in `draws`, shuffled
    ends: "array[int]"  # of each bucket in `draws`
    batch_sizes: tuple[int, ...]  # of each bucket

    def __len__(self) -> int:
        return len(self.starts)

    def item(self, index: int) -> tuple[int, ...]:
        start = self.starts[index]
        bucket = bisect_right(self.ends, start)
        return tuple(self.draws[start : min(start + self.batch_sizes[bucket], self.ends[bucket])])


def epoch_batches(buckets: Sequence[Bucket], seed: int, epoch: int) -> EpochBatches:
    """Return the batches of an epoch (from 1). Every draw occurs once; draws are shuffled within their bucket, and
    batches as a whole."""
    batches = EpochBatches(array("i"), array("i"), array("i"), tuple(bucket.batch_size for bucket in buckets))
    for number, bucket in enumerate(buckets):
        # random.shuffle orders an array as it would a list, without an object for each draw.
        draws = array("i", np.asarray(bucket.draws, dtype=np.int32).tobytes())
        random_for(seed, "draw order", epoch, number).shuffle(draws)
        first = len(batches.draws)
        batches.draws.extend(draws)
        batches.starts.extend(range(first, len(batches.draws), bucket.batch_size))
        batches.ends.append(len(batches.draws))
    random_for(seed, "batch order", epoch).shuffle(batches.starts)
    return batches


def plain_batches(buckets: Sequence[Bucket]) -> tuple[tuple[int, ...], ...]:
    """Return the batches without shuffling."""
    return tuple(
        tuple(np.asarray(bucket.draws[i : i + bucket.batch_size]).tolist())
        for bucket in buckets
        for i in range(0, len(bucket.draws), bucket.batch_size)
    )


def regularisation_repeats(num_train_draws: int, repeats: Sequence[int]) -> list[int]:
    """Return the number of draws of each regularisation image, whose sum is the number of training draws.

    Images are used with their own `repeats`, one after another, until the sum is reached. If they run out first,
    further rounds add one draw to each. Images that are not needed get 0.
    """
    # Both passes are sd-scripts': of more images than needed, the first ones are used.
    draws = [0] * len(repeats)
    total = 0
    for i, count in enumerate(repeats):
        if total >= num_train_draws:
            return draws
        draws[i] = count
        total += count
    while repeats and total < num_train_draws:
        for i in range(len(draws)):
            if total >= num_train_draws:
                break
            draws[i] += 1
            total += 1
    return draws
