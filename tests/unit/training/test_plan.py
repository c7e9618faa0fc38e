"""Steps, epochs and accumulation windows."""

from dataclasses import replace

import pytest

from library.options.training.run import RunOptions
from library.training.step.accumulation import StepPlan


def plan(num_batches: int, accumulation: int = 1, **run: int) -> StepPlan:
    options = replace(RunOptions(), gradient_accumulation_steps=accumulation, **run)
    return StepPlan.build(options, num_batches)


def test_epochs_win_over_steps() -> None:
    assert plan(7, accumulation=2, max_train_epochs=3, max_train_steps=999).max_train_steps == 3 * 4


def test_the_default_is_1600_steps_spread_over_whole_epochs() -> None:
    p = plan(100)
    assert (p.max_train_steps, p.num_epochs) == (1600, 16)


@pytest.mark.parametrize(("num_batches", "accumulation"), [(1, 1), (7, 3), (6, 3), (5, 8)])
def test_every_batch_of_an_epoch_is_in_one_window_and_windows_never_cross_epochs(
    num_batches: int, accumulation: int
) -> None:
    p = plan(num_batches, accumulation, max_train_epochs=2)
    for epoch in (1, 2):
        windows = list(p.windows(epoch, 0))
        assert [batch_index for window in windows for batch_index in window.batch_indices] == list(range(num_batches))
        assert [window.step for window in windows] == [(epoch - 1) * p.steps_per_epoch + i for i in range(len(windows))]
        assert all(len(window.batch_indices) == accumulation for window in windows[:-1])
        assert [window.ends_epoch for window in windows] == [False] * (len(windows) - 1) + [True]


def test_a_resumed_run_has_the_remaining_windows() -> None:
    p = plan(7, accumulation=3, max_train_steps=8)
    every = [window for epoch in p.epochs(0) for window in p.windows(epoch, 0)]
    assert [window.step for window in every] == list(range(8))
    for step in range(8):
        assert [window for epoch in p.epochs(step) for window in p.windows(epoch, step)] == every[step:]


@pytest.mark.parametrize("num_processes", [2, 3, 5])
def test_several_processes_share_the_batches_of_one_process_with_more_accumulation(num_processes: int) -> None:
    shared = StepPlan.build(replace(RunOptions(), gradient_accumulation_steps=2, max_train_epochs=1), 11, num_processes)
    alone = plan(11, accumulation=2 * num_processes, max_train_epochs=1)
    assert shared == alone
    for window in shared.windows(1, 0):
        shares = [list(window.share(rank, num_processes)) for rank in range(num_processes)]
        most = max(map(len, shares))
        # Losses are exchanged batch by batch, so that they come in the order of the window.
        in_turn = [share[turn] for turn in range(most) for share in shares if turn < len(share)]
        assert in_turn == list(window.batch_indices)
        padding = [window.padding_batch(rank, num_processes) for rank in range(num_processes)]
        assert padding == [None if len(share) == most else window.batch_indices[-1] for share in shares]


def test_a_batch_has_its_step_and_its_number() -> None:
    p = plan(7, accumulation=3)
    assert [p.step_of(2, i) for i in range(7)] == [3, 3, 3, 4, 4, 4, 5]
    assert [p.batch_number(2, i) for i in (0, 6)] == [7, 13]
