"""Which draws form which batch, in which order: a function of the seed and the epoch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from library.randomness import random_for


@dataclass(frozen=True, eq=False)
class Bucket:
    """The draws that share a size and a dataset; a draw is a number, one for each repeat of each picture."""

    dataset: int
    size: tuple[int, int]  # width, height
    batch_size: int
    draws: Sequence[int] | NDArray[np.int32]

    @property
    def num_batches(self) -> int:
        return -(-len(self.draws) // self.batch_size)


def epoch_batches(buckets: Sequence[Bucket], seed: int, epoch: int) -> list[tuple[int, ...]]:
    """The batches of an epoch (from 1), tuples of draws: every draw once, shuffled in its bucket, batches shuffled."""
    batches: list[tuple[int, ...]] = []
    for number, bucket in enumerate(buckets):
        draws = np.asarray(bucket.draws).tolist()
        random_for(seed, "draw order", epoch, number).shuffle(draws)
        batches += [tuple(draws[i : i + bucket.batch_size]) for i in range(0, len(draws), bucket.batch_size)]
    random_for(seed, "batch order", epoch).shuffle(batches)
    return batches


def plain_batches(buckets: Sequence[Bucket]) -> tuple[tuple[int, ...], ...]:
    """The same batches unshuffled: buckets and draws in their order."""
    return tuple(
        tuple(np.asarray(bucket.draws[i : i + bucket.batch_size]).tolist())
        for bucket in buckets
        for i in range(0, len(bucket.draws), bucket.batch_size)
    )


def regularisation_repeats(num_train_draws: int, repeats: Sequence[int]) -> list[int]:
    """How often each regularisation picture is drawn so that all together reach the number of training draws.

    One after another they count with their own `repeats` until the sum is reached; if they run out first, further
    rounds add one to each until it is. Pictures that are not needed get 0.
    """
    used = [0] * len(repeats)
    total = 0
    for i, count in enumerate(repeats):
        if total >= num_train_draws:
            return used
        used[i] = count
        total += count
    while repeats and total < num_train_draws:
        for i in range(len(used)):
            if total >= num_train_draws:
                break
            used[i] += 1
            total += 1
    return used
