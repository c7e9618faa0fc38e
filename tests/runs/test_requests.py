"""Files that ask a run that trains to save or draw now, between the steps of its schedule."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from library.training.loop.steps import Steps
from library.training.step.accumulation import Window
from tests.running import Finished
from tests.runs.test_processes import launch_two
from tests.runs.test_resume import ALL_RANDOM, assert_equal_states

Train = Callable[..., Finished]
PROMPT = "a (red:1.3) cat --w 64 --h 64 --d 3 --s 3 --l 4\n"


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, list[str]]]:
    """Files that appear in the output folder `out` while the step after the key is computed."""
    files, finish = dict[int, list[str]](), Steps.finish

    def finish_and_ask(steps: Steps, window: Window) -> None:
        finish(steps, window)
        for name in files.get(window.step + 1, []):
            (tmp_path / "out" / name).touch()

    monkeypatch.setattr(Steps, "finish", finish_and_ask)
    yield files


@pytest.fixture
def arguments(base_arguments: list[str], tmp_path: Path) -> list[str]:
    (tmp_path / "prompts.txt").write_text(PROMPT)
    previews = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "4"]
    return [
        *base_arguments,
        *ALL_RANDOM,
        *previews,
        "--max_train_steps",
        "8",
        "--save_state",
        "--save_every_n_steps",
        "4",
    ]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def assert_equal_but_for_the_stop(whole: Path, asked: Path) -> None:
    """Compare states of which one lists step 3 as saved between the steps of the schedule."""
    manifest = asked / "train_state.json"
    text = manifest.read_text()
    without = re.sub(r'("stops",\s*\{\s*"list":\s*\[)\s*3\s*\]', r"\1]", text)
    assert without != text
    manifest.write_text(without)
    assert_equal_states(whole, asked)


def test_a_run_that_is_asked_to_save_and_draw_trains_as_one_that_is_not(
    train: Train, arguments: list[str], tmp_path: Path, asked: dict[int, list[str]]
) -> None:
    whole = train([*arguments, "--output_dir", str(tmp_path / "whole")])
    assert whole.status == 0, whole.stderr
    asked |= {2: ["mine-save-now", "mine-draw-now"], 3: ["mine-save-now", "mine-draw-now"], 8: ["mine-save-now"]}
    done = train(arguments)
    assert done.status == 0, done.stderr
    more = {"mine-step00000003.safetensors", "mine-step00000003-state"}
    assert {*names(tmp_path / "out")} == {*names(tmp_path / "whole")} | more
    drawn = [path.name.split("_")[1] for path in sorted((tmp_path / "out" / "sample").glob("*.png"))]
    assert drawn == ["000003", "000004", "000008"]
    assert done.stdout.count("saving checkpoint") == whole.stdout.count("saving checkpoint") + 1
    assert_equal_but_for_the_stop(tmp_path / "whole" / "mine-state", tmp_path / "out" / "mine-state")
    resumed = train([*arguments, "--resume", str(tmp_path / "out" / "mine-step00000003-state")])
    assert resumed.status == 0, resumed.stderr
    assert_equal_but_for_the_stop(tmp_path / "whole" / "mine-state", tmp_path / "out" / "mine-state")


def test_what_was_saved_on_request_is_outdated_like_a_stop(
    train: Train, arguments: list[str], tmp_path: Path, asked: dict[int, list[str]]
) -> None:
    asked |= {2: ["mine-save-now"]}
    done = train([*arguments, "--save_last_n_steps", "4"])
    assert done.status == 0, done.stderr
    assert not [name for name in names(tmp_path / "out") if "step00000003" in name]


def test_without_prompts_a_request_to_draw_says_what_is_missing(
    train: Train, base_arguments: list[str], tmp_path: Path, asked: dict[int, list[str]]
) -> None:
    asked |= {1: ["mine-draw-now"], 2: ["mine-save-now.txt"]}
    done = train([*base_arguments, "--max_train_steps", "3"])
    assert done.status == 0 and "this run has no --sample_prompts with an interval" in done.stderr
    assert "mine-draw-now" not in names(tmp_path / "out") and "mine-save-now.txt" in names(tmp_path / "out")


def test_a_file_with_content_is_no_request(train: Train, base_arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine-save-now").write_text("the user's")
    done = train([*base_arguments, "--max_train_steps", "2"])
    assert done.status == 0 and (tmp_path / "out" / "mine-save-now").read_text() == "the user's"
    assert done.stdout.count("saving checkpoint") == 1


@pytest.mark.slow
def test_two_processes_answer_together(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("mine-save-now", "mine-draw-now"):
        (tmp_path / "out" / name).touch()
    done = launch_two(arguments)
    assert done.status == 0, done.stderr
    assert "mine-step00000001.safetensors" in names(tmp_path / "out")
    drawn = [path.name.split("_")[1] for path in sorted((tmp_path / "out" / "sample").glob("*.png"))]
    assert drawn == ["000001", "000004", "000008"]
