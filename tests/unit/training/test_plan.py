"""Steps, epochs and accumulation windows."""

from dataclasses import replace

import pytest

from library.options.run import RunOptions
from library.training.plan import Plan


def plan(num_batches: int, accumulation: int = 1, **run: int) -> Plan:
    options = replace(RunOptions(), gradient_accumulation_steps=accumulation, **run)
    return Plan.build(options, num_batches)


def test_epochs_win_over_steps() -> None:
    assert plan(7, accumulation=2, max_train_epochs=3, max_train_steps=999).max_train_steps == 3 * 4


def test_the_default_is_1600_steps_spread_over_whole_epochs() -> None:
    p = plan(100)
    assert (p.max_train_steps, p.num_epochs) == (1600, 16)


@pytest.mark.parametrize(("num_batches", "accumulation"), [(1, 1), (7, 3), (6, 3), (5, 8)])
def test_every_batch_of_an_epoch_is_in_one_window_and_windows_never_cross_epochs(
    num_batches: int, accumulation: int
) -> None:
    p = plan(num_batches, accumulation)
    ends = [i for i in range(num_batches) if p.ends_window(i)]
    assert len(ends) == p.steps_per_epoch
    assert ends[-1] == num_batches - 1
    sizes = [p.window_size(i) for i in ends]
    assert sum(sizes) == num_batches
    assert all(size == accumulation for size in sizes[:-1])


def test_a_batch_knows_its_step_and_its_number() -> None:
    p = plan(7, accumulation=3)
    assert [p.step_of(2, i) for i in range(7)] == [3, 3, 3, 4, 4, 4, 5]
    assert [p.batch_number(2, i) for i in (0, 6)] == [7, 13]
