"""--save_every_n_minutes: a run that is killed goes on from a state of the last minutes, and no number changes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from library.training.loop.steps import Steps
from library.training.saving import checkpoints, timed
from library.training.saving.state import TENSOR_FILE
from library.training.step.accumulation import Window
from tests.running import Finished
from tests.runs.test_processes import launch_two
from tests.runs.test_resume import ALL_RANDOM, assert_equal_states

Train = Callable[..., Finished]


class Killed(BaseException):
    """Ends a run as a power cut does: nothing is saved."""


class Clock:
    """A clock that goes on by a minute a step, and cuts the power before the work after a step."""

    def __init__(self) -> None:
        self.minutes, self.cut_at = 0, 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock, finish = Clock(), Steps.finish

    def finish_later(steps: Steps, window: Window) -> None:
        clock.minutes += 1
        if window.step + 1 == clock.cut_at:
            raise Killed
        finish(steps, window)

    monkeypatch.setattr(Steps, "finish", finish_later)
    monkeypatch.setattr(timed, "monotonic", lambda: 60.0 * clock.minutes)
    yield clock


def states(folder: Path) -> list[str]:
    return sorted(path.name.removeprefix("mine-").removesuffix("-state") for path in folder.glob("*-state"))


@pytest.fixture
def arguments(base_arguments: list[str], tmp_path: Path) -> list[str]:
    return [*base_arguments, *ALL_RANDOM, "--max_train_steps", "8", "--save_state_on_train_end"]


def run_until(clock: Clock, step: int, train: Train, arguments: list[str]) -> None:
    clock.cut_at = step
    with pytest.raises(Killed):
        train(arguments)
    clock.cut_at = 0


def test_a_run_that_is_cut_between_timed_states_goes_on_exactly(
    clock: Clock, train: Train, arguments: list[str], tmp_path: Path
) -> None:
    whole = train([*arguments, "--output_dir", str(tmp_path / "whole")])
    assert whole.status == 0, whole.stderr
    parts = [*arguments, "--autoresume", "--save_every_n_minutes", "2"]
    run_until(clock, 6, train, parts)
    out = tmp_path / "out"
    assert states(out) == ["step00000002-timed", "step00000004-timed"]
    run_until(clock, 8, train, [*parts, "--save_every_n_minutes", "1"])
    assert states(out) == ["step00000006-timed", "step00000007-timed"]
    done = train(parts)
    assert done.status == 0 and "at step 7 of 8" in done.stderr and "uninterrupted" not in done.stderr
    assert [path.name for path in out.glob("*-state")] == ["mine-state"]
    assert_equal_states(tmp_path / "whole" / "mine-state", out / "mine-state")


def test_the_state_before_is_kept_until_the_next_is_whole_and_taken_if_the_newest_is_damaged(
    clock: Clock, train: Train, arguments: list[str], tmp_path: Path
) -> None:
    parts, out = [*arguments, "--autoresume", "--save_every_n_minutes", "1"], tmp_path / "out"
    run_until(clock, 5, train, parts)
    assert states(out) == ["step00000003-timed", "step00000004-timed"]
    damaged = out / "mine-step00000004-timed-state" / TENSOR_FILE
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")
    run_until(clock, 5, train, [*parts, "--save_every_n_minutes", "9"])
    assert states(out) == ["step00000003-timed", "step00000004-timed"]  # none is outdated before two are whole
    run_until(clock, 7, train, parts)
    assert states(out) == ["step00000005-timed", "step00000006-timed"]


def test_a_run_that_is_killed_after_its_last_state_leaves_no_timed_ones(
    clock: Clock, train: Train, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, words = tmp_path / "out", [*arguments, "--autoresume", "--save_every_n_minutes", "1"]
    with monkeypatch.context() as context:
        context.setattr(checkpoints, "remove", lambda name, path, kind, events: None)
        assert train(words).status == 0
    assert len(states(out)) == 8
    assert train(words).status == 0
    assert [path.name for path in out.glob("*-state")] == ["mine-state"]


def test_scheduled_states_are_not_outdated_by_timed_ones(
    clock: Clock, train: Train, arguments: list[str], tmp_path: Path
) -> None:
    words = ["--save_every_n_minutes", "1", "--save_every_n_steps", "4", "--save_state"]
    run_until(clock, 8, train, [*arguments, *words])
    # Step 4 has a state without the clock's help.
    assert states(tmp_path / "out") == ["step00000004", "step00000006-timed", "step00000007-timed"]


def test_a_run_without_states_at_its_end_leaves_none(clock: Clock, train: Train, base_arguments: list[str]) -> None:
    done = train([*base_arguments, "--max_train_steps", "3", "--save_every_n_minutes", "1"])
    assert done.status == 0 and done.stdout.count("removing old state") == 2
    assert "step00000003" not in done.stdout  # the file is its end


@pytest.mark.nightly
def test_two_processes_that_save_by_the_clock_of_the_first_train_as_without(
    base_arguments: list[str], tmp_path: Path
) -> None:
    arguments = [*base_arguments, "--save_state_on_train_end"]
    plain = launch_two([*arguments, "--output_dir", str(tmp_path / "plain")])
    assert plain.status == 0, plain.stderr
    done = launch_two([*arguments, "--save_every_n_minutes", "1e-9"])  # at every step
    assert done.status == 0, done.stderr
    assert done.stdout.count("saving state") == 4 and done.stdout.count("removing old state") == 3
    assert_equal_states(tmp_path / "plain" / "mine-state", tmp_path / "out" / "mine-state")
