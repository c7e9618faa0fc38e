"""Which earlier run the same or another command line of train.py goes on with."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

import train
from library.base.errors import UserError
from library.checkpoints.marks import TRAIN_PY
from library.checkpoints.saving import save_safetensors
from library.train_photos.plan import Files
from library.train_photos.record import Record
from library.train_photos.runs import Start, choose_start, find_runs, list_names
from library.training.config_file import format_config
from library.training.reporting.progress import Part
from library.training.saving.state import TENSOR_FILE, save_state
from tests.runs.test_resume import Clock, Killed, assert_equal_states
from tests.runs.test_resume import clock as clock
from tests.train_photos.test_train import build_base, write_turned
from tests.unit.training.test_own_files import OtherRun
from tests.unit.training.test_own_files import other_run as other_run

RECORD = Record("3 photos (ab)", "cd", "mycat, a cat", "/m/a.safetensors", "character")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def write_run(out: Path) -> Callable[..., Files]:
    """Write the files of a run at a step, as a killed or a finished one leaves them."""

    def write(name: str, step: int, record: Record = RECORD, is_finished: bool = False, steps: int = 100) -> Files:
        files = Files(out, name)
        files.config.write_text(f"{TRAIN_PY}\n{record.line}{format_config({'max_train_steps': steps})}")
        if step:
            done: list[Part] = ["end"] if is_finished else []
            folder = out / (f"{name}-state" if is_finished else f"{name}-step{step:08d}-timed-state")
            save_state(
                folder,
                step=step,
                epoch=1,
                seed=1,
                num_processes=1,
                options={"output_name": name},
                dataset={},
                network=nn.Linear(1, 1),
                keepers={},
                done=done,
            )
        if is_finished:
            save_safetensors(files.adapter, {}, {"ss_network_module": "networks.lora"})
            (out / f"{name}-strengths").mkdir()
            (out / f"{name}-strengths" / "strengths.png").touch()
        return files

    return write


def choose(
    folder: Path, record: Record = RECORD, steps: int | None = None, answer: str = ""
) -> tuple[Start, list[str]]:
    """Return the choice and what was said and asked."""
    said: list[str] = []

    def ask(sentence: str, question: str) -> str:
        said.append(f"{sentence} {question}".strip())
        return answer

    runs, free = find_runs(list_names(folder, "mine"))
    return choose_start(runs, free, record, lambda: steps, ask), said


def test_the_same_command_line_goes_on_with_an_unfinished_run(write_run: Callable[..., Files], out: Path) -> None:
    write_run("mine", 100, is_finished=True)
    write_run("mine-2", 42)
    start, said = choose(out)
    assert start.earlier is not None and start.files.name == "mine-2"
    assert said == ["an unfinished run is there: mine-2, 42 of 100 steps continue [Enter], start anew [n]?"]
    start, _ = choose(out, answer="n")
    assert start == Start(Files(out, "mine-3"))


def test_a_run_that_was_killed_before_its_first_state_goes_on_from_the_beginning(
    write_run: Callable[..., Files], out: Path
) -> None:
    write_run("mine", 0)
    start, said = choose(out)
    assert start.earlier is not None and "0 of 100 steps" in said[0]


def test_another_length_goes_on_unless_the_run_is_longer_already(write_run: Callable[..., Files], out: Path) -> None:
    write_run("mine", 42)
    longer = replace(RECORD, length={"steps": 300})
    assert choose(out, longer, 300)[0].earlier is not None
    start, said = choose(out, replace(RECORD, length={"steps": 40}), 40)
    assert start == Start(Files(out, "mine-2")) and "more than 40" in said[0]


def test_a_finished_run_stays_and_a_longer_one_goes_on_from_it_under_a_new_name(
    write_run: Callable[..., Files], out: Path
) -> None:
    write_run("mine", 100, is_finished=True)
    start, said = choose(out)
    assert start == Start(Files(out, "mine-2")) and said == ["mine is finished and stays: this is a new run, mine-2"]
    start, _ = choose(out, replace(RECORD, length={"steps": 150}), 150)
    assert start == Start(Files(out, "mine-2"), origin=str(out / "mine-state"))
    (out / "mine-strengths" / "strengths.png").unlink()  # a cut while the sheet was drawn
    assert choose(out)[0].earlier is not None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"photos": "5 photos (ef)"}, "3 photos (ab) then and 5 photos (ef) now"),
        ({"captions": "x"}, "other captions"),
        ({"options": {"network_dim": 8}}, "--network_dim not given then and 8 now"),
    ],
)
def test_what_differs_is_named_and_asked(
    changes: dict[str, object], named: str, write_run: Callable[..., Files], out: Path
) -> None:
    write_run("mine", 42)
    start, said = choose(out, replace(RECORD, **changes))  # type: ignore[arg-type]
    assert named in said[0] and start == Start(Files(out, "mine-2"))
    start, _ = choose(out, replace(RECORD, **changes), answer="c")  # type: ignore[arg-type]
    assert start.origin == str(out / "mine-step00000042-timed-state") and start.files.name == "mine-2"


@pytest.mark.parametrize("changes", [{"trigger": "dog"}, {"base": "/m/b"}, {"kind": "style"}])
def test_a_run_of_something_else_is_left_alone(
    changes: dict[str, str], write_run: Callable[..., Files], out: Path
) -> None:
    write_run("mine", 42)
    assert choose(out, replace(RECORD, **changes)) == (Start(Files(out, "mine-2")), [])  # type: ignore[arg-type]


def test_the_state_before_a_damaged_one_counts(write_run: Callable[..., Files], out: Path) -> None:
    write_run("mine", 42)
    write_run("mine", 50)
    (out / "mine-step00000050-timed-state" / TENSOR_FILE).write_bytes(b"")
    assert "42 of 100 steps" in choose(out)[1][0]


def test_a_run_that_is_running_is_named(
    write_run: Callable[..., Files], out: Path, request: pytest.FixtureRequest
) -> None:
    write_run("mine", 42)
    other: OtherRun = request.getfixturevalue("other_run")
    other("alone")
    with pytest.raises(UserError, match=r"another run is writing files of this name \(process .* use another --name"):
        choose(out)


def test_a_name_is_free_with_what_a_cut_start_left_and_not_with_files_of_a_run(out: Path) -> None:
    (out / "mine-dataset.toml").write_text(TRAIN_PY)
    assert choose(out)[0].files.name == "mine"
    (out / "mine-step00000100.safetensors").touch()  # by the script
    assert choose(out)[0].files.name == "mine-2"


@pytest.mark.slow
def test_a_killed_run_goes_on_exactly_and_a_finished_one_is_never_replaced(
    tmp_path: Path, fresh_process: None, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    clock: Clock = request.getfixturevalue("clock")
    photos = tmp_path / "photos"
    photos.mkdir()
    write_turned(photos)
    base = build_base("sd3", tmp_path / "base")
    words = [str(photos), "--base", base, "--trigger", "mycat, a cat", "--name", "mine", "--yes"]
    timed = [*words, "--steps", "6", "--save_every_n_minutes", "2", "--output_dir", str(tmp_path / "out")]
    assert train.main([*words, "--steps", "6", "--output_dir", str(tmp_path / "whole")]) == 0
    clock.cut_at = 6
    with pytest.raises(Killed):
        train.main(timed)
    clock.cut_at = 0
    assert {path.name for path in (tmp_path / "out").glob("*-state")} == {
        "mine-step00000002-timed-state",
        "mine-step00000004-timed-state",
    }
    capsys.readouterr()
    assert train.main(timed) == 0
    printed = capsys.readouterr().out
    assert (
        "an unfinished run is there: mine, 4 of 6 steps" in printed
        and "give the same command with --steps 9" in printed
    )
    assert_equal_states(tmp_path / "whole" / "mine-state", tmp_path / "out" / "mine-state")
    recommended = (tmp_path / "out" / "mine.safetensors").read_bytes()
    assert train.main([*timed, "--steps", "9"]) == 0
    assert "mine is finished: this run, mine-2, goes on from its step 6" in capsys.readouterr().out
    assert (tmp_path / "out" / "mine.safetensors").read_bytes() == recommended
    assert (tmp_path / "out" / "mine-2.safetensors").exists()


@pytest.mark.slow
def test_a_start_that_fails_leaves_no_plan(tmp_path: Path, fresh_process: None) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    out.mkdir()
    write_turned(photos)
    (out / "mine-report.html").write_text("my own page")  # which the run would replace
    words = [str(photos), "--base", build_base("sd3", tmp_path / "base"), "--output_dir", str(out), "--name", "mine"]
    assert train.main([*words, "--steps", "2", "--yes"]) == 1
    assert {path.name for path in out.iterdir()} == {"mine-report.html", "mine.log"}
    assert "my own page" in (out / "mine-report.html").read_text()
