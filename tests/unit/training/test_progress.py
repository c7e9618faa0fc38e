"""The running average of the loss."""

import pytest

from library.training.reporting.progress import LossAverage


def test_each_position_of_an_epoch_counts_with_its_last_loss() -> None:
    average = LossAverage()
    for place, loss in ((0, 1.0), (1, 3.0), (0, 2.0)):
        average.add(place, loss)
    assert average.mean == 2.5


def test_positions_that_a_smaller_dataset_lacks_are_dropped() -> None:
    average = LossAverage({0: 0.1, 1: 0.2, 2: 9.0}, 9.3)
    average.keep_batches_below(2)
    assert average.mean == pytest.approx(0.15, rel=1e-15)


def test_an_average_that_loses_no_position_is_bit_identical() -> None:
    total = 0.1 + 0.2 + 0.3  # not the correctly rounded sum
    average = LossAverage({0: 0.1, 1: 0.2, 2: 0.3}, total)
    average.keep_batches_below(3)
    assert average.total == total
