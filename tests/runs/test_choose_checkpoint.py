"""Which saved file a run suggests, and what tools/choose_checkpoint.py measures of the same files."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from library.training.report.writer import read_report
from tests.running import Finished, make_pictures
from tests.runs.test_events import events_of, of_kind

Train = Callable[..., Finished]


@pytest.fixture
def arguments(base_arguments: list[str], tmp_path: Path) -> list[str]:
    """Six of twelve pictures are set aside; ten steps with a rate that overshoots, saved after every second one."""
    words = [word for word in base_arguments if word != "--no_report"]
    make_pictures(tmp_path / "data" / "1_more", 6, seed=3)
    return [
        *words, "--console_log_simple", "--validation_split", "0.5", "--learning_rate", "0.03", "--max_train_steps",
        "10", "--save_every_n_steps", "2", "--validate_every_n_steps", "2", "--validate_at_first", "--seed", "11",
    ]  # fmt: skip


def test_a_run_compares_its_files_from_the_validations_it_made(
    train: Train, arguments: list[str], tmp_path: Path
) -> None:
    """Resumed in the middle it says the same, and the report has it."""
    told = [*arguments, "--log_events", str(tmp_path / "whole.jsonl")]
    whole = train(told)
    assert whole.status == 0, whole.stdout
    events = events_of(tmp_path / "whole.jsonl")
    (choice,) = of_kind(events, "choice")
    losses = {one["step"]: one["loss"] for one in of_kind(events, "validation")}
    found = choice["candidates"]
    assert [one["step"] for one in found] == [0, 2, 4, 6, 8, 10, 10] and found[0]["file"] is None
    assert [one["loss"] for one in found] == pytest.approx([losses[one["step"]] for one in found], rel=1e-12)
    best = min(found[1:], key=lambda one: one["loss"])
    assert all(one["difference"] == pytest.approx(one["loss"] - best["loss"], abs=1e-12) for one in found)
    earliest = next(one for one in found[1:] if not one["is_worse"])
    assert (choice["suggested"], choice["step"], choice["num_pictures"]) == (earliest["file"], earliest["step"], 6)
    assert f"suggested file: {Path(earliest['file']).name}" in whole.stdout
    report = read_report(tmp_path / "out" / "mine-report.html")
    assert report.choice == {name: choice[name] for name in choice if name not in ("v", "event", "time")}

    cut = [*arguments, "--save_state", "--max_train_steps", "4"]
    assert train(cut).status == 0
    assert read_report(tmp_path / "out" / "mine-report.html").choice is not None
    state = str(tmp_path / "out" / "mine-step00000004-state")
    resumed = train([*arguments, "--resume", state, "--log_events", str(tmp_path / "resumed.jsonl")])
    assert resumed.status == 0, resumed.stdout
    assert of_kind(events_of(tmp_path / "resumed.jsonl"), "choice")[0]["candidates"] == found


def test_files_that_were_not_measured_are_told_of(train: Train, arguments: list[str]) -> None:
    done = train([*arguments, "--validate_every_n_steps", "4"])
    assert "2 of 6 saved files were not measured as they are; python3 tools/choose_checkpoint.py" in done.stdout
    assert re.search(r"suggested file: mine", done.stdout)
