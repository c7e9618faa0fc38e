"""The HTML report of a run."""

import re
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from library.environment.running import child_environment
from library.training.report_page.writer import read_report
from tests.running import Finished
from tools import report, start

Train = Callable[..., Finished]


@pytest.fixture
def arguments(base_arguments: list[str]) -> list[str]:
    """Return the usual arguments, with the report enabled."""
    return [word for word in base_arguments if word != "--no_report"]


def test_the_report_of_a_run_equals_the_report_built_from_its_events(
    train: Train, arguments: list[str], tmp_path: Path
) -> None:
    """This also holds after resuming: the report takes earlier steps from the existing one."""
    (tmp_path / "prompts.txt").write_text("a </script> cat --w 64 --h 64 --s 1\na dog --w 64 --h 64 --s 1\n")
    events, written, rebuilt = tmp_path / "events.jsonl", tmp_path / "out" / "mine-report.html", tmp_path / "made.html"
    words = [
        *arguments, "--log_events", str(events), "--validation_split", "0.34", "--sample_prompts",
        str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "3", "--save_state", "--autoresume",
    ]  # fmt: skip
    for num_steps in ("4", "7"):
        done = train([*words, "--max_train_steps", num_steps])
        assert done.status == 0, done.stderr
        assert report.main([str(events), "--output", str(rebuilt)]) == 0
        assert rebuilt.read_bytes() == written.read_bytes()
    record = read_report(written)
    assert record.step == 7 and [item["first_step"] for item in record.sessions] == [0, 4]
    assert len(record.curves.by_name["loss"].total) == 7 and [item["step"] for item in record.previews.items] == [3, 6]
    assert [(item["name"], item["step"]) for item in record.files if item["kind"] == "weights"] == [
        ("mine.safetensors", 7)
    ]
    assert record.plan is not None and record.plan["resumed_from"].endswith("mine-state")
    file_names = sorted(re.sub(r"_\d{14}", "", path.name) for path in (tmp_path / "out").iterdir())
    assert file_names == ["mine-report.html", "mine-state", "mine.safetensors", "sample", "sample_grid"]


def test_a_partial_report_of_a_killed_run_is_deleted(train: Train, arguments: list[str], tmp_path: Path) -> None:
    assert train([*arguments, "--save_state", "--max_train_steps", "1"]).status == 0
    half, of_others = (tmp_path / "out" / f".{name}-report.0123456789ab.html" for name in ("mine", "other"))
    half.write_text("<!doctype ht")
    of_others.write_text("<!doctype ht")
    assert train([*arguments, "--autoresume", "--max_train_steps", "2"]).status == 0
    assert not half.exists() and of_others.exists()


def test_the_report_says_why_a_run_ended_early(
    train: Train, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the <b>card</b> is gone")

    monkeypatch.setattr("library.training.loop.steps.report_step", fail)
    assert train(arguments).status == 1
    end = read_report(tmp_path / "out" / "mine-report.html").sessions[-1]["end"]
    assert end["reason"] == "error" and "the <b>card</b> is gone" in end["error"]


@pytest.mark.parametrize("words", [["--no_report"], ["--dry_run"], ["--network_args", "conv_dim=x"]])
def test_no_report_is_written_if_disabled_or_if_nothing_is_trained(
    train: Train, arguments: list[str], tmp_path: Path, words: list[str]
) -> None:
    train([*arguments, *words])
    assert not list(tmp_path.rglob("*report*"))


def test_a_file_without_events_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("a,b\n1,2\n")
    assert report.main([str(path)]) == 1
    assert "line 1 is not an event" in capsys.readouterr().err
    path.write_text("")
    assert report.main([str(path)]) == 1
    assert f"{path} has no events; use the file written by --log_events" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [path]


def test_the_quickstarts_report_shows_images_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run both commands of the quickstart, shortened."""
    (tmp_path / "prompts.txt").write_text("a small blue heart on a gray background --w 64 --h 64 --s 2 --l 2 --d 1\n")
    python = Path(sys.executable)
    names = {"ADAPTER": "quickstart.safetensors", "IMAGE": "image.png", "REPORT": "quickstart-report.html"}
    for constant, name in {**names, "PROMPTS": "prompts.txt"}.items():
        monkeypatch.setattr(start, constant, str(tmp_path / name))
    for command in ([*start.training_command(python), "--steps", "1"], start.image_command(python)):
        done = subprocess.run(command, cwd=start.ROOT, env=child_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    shown = read_report(tmp_path / "quickstart-report.html")
    assert shown.step == 1 and shown.sheet is not None
    with (
        Image.open(BytesIO(b64decode(shown.sheet.partition(",")[2]))) as image,
        Image.open(tmp_path / "image.png") as drawn,
    ):
        assert image.size == drawn.size
