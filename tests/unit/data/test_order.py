"""The order of draws and the number of times regularisation images are drawn."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.plan.order import Bucket, epoch_batches, regularisation_repeats

BUCKETS = (
    Bucket(0, (64, 64), 4, tuple(range(10))),
    Bucket(0, (64, 128), 4, tuple(range(10, 15))),
    Bucket(1, (64, 64), 3, (15, 16, 17)),
)


def test_every_epoch_has_every_draw_once_and_each_batch_one_bucket():
    for epoch in (1, 2, 3):
        batches = epoch_batches(BUCKETS, seed=4, epoch=epoch)
        assert Counter(draw for batch in batches for draw in batch) == Counter(range(18))
        assert sorted(len(batch) for batch in batches) == [1, 2, 3, 4, 4, 4]
        assert all(any(set(batch) <= set(bucket.draws) for bucket in BUCKETS) for batch in batches)


def test_the_order_depends_only_on_seed_and_epoch():
    first = epoch_batches(BUCKETS, seed=4, epoch=2)
    epoch_batches(BUCKETS, seed=4, epoch=7)
    assert epoch_batches(BUCKETS, seed=4, epoch=2) == first
    assert epoch_batches(BUCKETS, seed=4, epoch=3) != first != epoch_batches(BUCKETS, seed=5, epoch=2)


def test_each_epoch_shuffles_the_batches_and_the_draws_within_each_bucket():
    """Buckets of one draw show only the order of batches; a bucket of one batch shows only that of its draws."""
    single = [Bucket(0, (64, 64 * i), 4, (i,)) for i in range(1, 9)]
    whole = [Bucket(0, (64, 64 * i), 8, tuple(range(8))) for i in (1, 2)]
    assert len({tuple(epoch_batches(single, 4, epoch)) for epoch in range(1, 6)}) == 5
    orders = [order for epoch in range(1, 6) for order in epoch_batches(whole, 4, epoch)]
    assert len(set(orders)) == 10, "also buckets of equal draws have orders of their own"
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(8))}
    assert [bucket.num_batches for bucket in BUCKETS] == [3, 2, 1]


@pytest.mark.parametrize(
    ("num_train_draws", "repeats", "expected"),
    [
        (4, [1], [4]),
        (10, [1, 1, 1], [4, 3, 3]),
        (5, [2, 2, 2, 2], [2, 2, 2, 0]),  # the third image exceeds the required sum
        (3, [1, 1, 1, 1], [1, 1, 1, 0]),
        (0, [3, 1], [0, 0]),
        (7, [], []),
    ],
)
def test_regularisation_images_are_repeated_until_there_are_enough(num_train_draws, repeats, expected):
    assert regularisation_repeats(num_train_draws, repeats) == expected


@given(st.integers(0, 60), st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_regularisation_exceeds_the_training_draws_by_less_than_one_image(num_train_draws, repeats):
    used = regularisation_repeats(num_train_draws, repeats)
    assert sum(used) >= num_train_draws
    assert sum(used) - num_train_draws < max(repeats)
