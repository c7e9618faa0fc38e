"""Comparing, ranking and listing runs by their reports."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from library.base.atomic_files import write_whole
from library.base.errors import UserError
from library.training.report_page import index
from library.training.report_page.comparison import differences, is_measured_alike, label_runs, read_run
from library.training.report_page.index import FILE_NAME, IndexedRuns, IndexWriter, write_index
from library.training.report_page.page import read_data
from library.training.report_page.record import Record
from library.training.report_page.writer import ReportWriter, build_report, read_report
from library.training.reporting.events import Event
from tests import browser, chromium
from tests.event_lines import EVIL, audit, lines_of, plan, start, validation, whole_run
from tools import compare_runs


def record_of(*events: Event) -> Record:
    record = Record()
    for line in lines_of(events):
        record.add(line)
    return record


def test_differing_options_data_and_versions_are_listed_but_names_are_not() -> None:
    first = record_of(start("a", learning_rate=1e-4, seed=3, log_events="a.jsonl"), audit("cats"), plan(10))
    second = record_of(start("b", learning_rate=1e-4, network_dim=8, seed=4), audit("dogs"), plan(20))
    second.sessions[-1]["versions"]["torch"] = "2.10"
    assert differences([first, second]) == [
        ["--seed", 3, 4],
        ["max train steps", 10, 20],
        ["images of cats", "9 x 2", None],
        ["version of torch", "2.9", "2.10"],
        ["--network_dim", None, 8],
        ["images of dogs", None, "9 x 2"],
    ]
    assert differences([first, first, first]) == []


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, True), ({"validation_split": 0.2}, False), ({"validation_seed": 5}, False), ({"validation_seed": 1}, True)],
)
def test_validation_losses_are_compared_only_if_measured_alike(options: dict[str, float], expected: bool) -> None:
    """The plan's seed is 1, which selects the images if no validation_seed is given."""
    first = record_of(start("a", validation_split=0.1), plan(10))
    second = record_of(start("b", **{"validation_split": 0.1, **options}), plan(10))
    assert is_measured_alike([first, second]) == expected


def test_runs_of_the_same_name_get_different_labels() -> None:
    records = [record_of(start(name)) for name in ("cat", "cat", "cat", "dog")]
    paths = [Path("/x/one/cat.jsonl"), Path("/x/two/cat.jsonl"), Path("/y/one/cat.jsonl"), Path("/x/dog.jsonl")]
    assert label_runs(records, paths) == ["one/cat", "two/cat", "one/cat (2)", "dog"]


def test_a_folder_a_report_and_a_file_of_events_are_the_same_run(tmp_path: Path) -> None:
    lines = lines_of(whole_run(20))
    record = Record()
    for line in lines:
        record.add(line)
    write_whole(tmp_path / "out" / "cat-report.html", build_report(record))
    (tmp_path / "events.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for path in (tmp_path / "out", tmp_path / "out" / "cat-report.html", tmp_path / "events.jsonl"):
        assert read_run(path).as_json() == record.as_json()


def test_inputs_that_cannot_be_compared_are_refused_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="holds 0 reports of runs"):
        read_run(tmp_path)
    for name in ("a", "b"):
        write_whole(tmp_path / f"{name}-report.html", build_report(record_of(start(name))))
    with pytest.raises(UserError, match=r"2 reports of runs \(a-report\.html, b-report\.html\)"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="ended before its training began"):
        read_run(tmp_path / "a-report.html")
    assert compare_runs.main([str(tmp_path), "--output", str(tmp_path / "x.html")]) == 1
    assert "name two runs or more" in capsys.readouterr().err and not (tmp_path / "x.html").exists()


def test_foreign_texts_are_embedded_only_as_data(tmp_path: Path) -> None:
    paths = [tmp_path / "a-report.html", tmp_path / "b-report.html"]
    for path in paths:
        write_whole(path, build_report(record_of(*whole_run(20, f"{EVIL}{path.name}"))))
    assert compare_runs.main([*map(str, paths), "--output", str(tmp_path / "x.html")]) == 0
    page = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert page.count("<script") == 5 and "<img" not in page and page.count("</title>") == 1


# Ranking the runs of a folder by their reports, which may come from several machines.


def write_run(folder: Path, name: str, losses: dict[str, float], step: int = 8, **options: Any) -> None:
    record = Record()
    measured = replace(validation(step, 1.0, (step, 1.0)), losses=losses)
    for line in lines_of([start(name, **options), plan(10), measured]):
        record.add(line)
    write_whole(folder / f"{name}-report.html", build_report(record))


def by_digest(*losses: float, first: int = 0) -> dict[str, float]:
    return {f"digest{number}": loss for number, loss in enumerate(losses, first)}


def rank(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = compare_runs.main(["--rank", str(folder)])
    captured = capsys.readouterr()
    return status, captured.out + captured.err


def test_runs_are_paired_by_the_content_of_their_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The best run has measured another image too, in which the other's file would have been the better one."""
    noise = [0.01, -0.01, 0.02, 0.0, -0.02, 0.01, 0.0, -0.01, 0.01]
    write_run(tmp_path, "best", by_digest(*(i + wobble for i, wobble in enumerate(noise)), 90.0))
    write_run(tmp_path, "worse", by_digest(*(i + 0.5 for i in range(9))))
    status, said = rank(tmp_path, capsys)
    assert status == 0 and "differs" not in said
    assert [line.split()[:3] for line in said.splitlines()[1:3]] == [["1", "best", "8"], ["2", "worse", "8"]]
    assert "best is significantly better than every other adapter" in said


def test_what_cannot_be_ranked_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "0 of its 0 reports have losses of held-out images" in rank(tmp_path, capsys)[1]
    write_run(tmp_path, "a", by_digest(1.0, 2.0, 3.0))
    write_run(tmp_path, "b", by_digest(1.0, 2.0, 3.0, first=2))
    status, said = rank(tmp_path, capsys)
    assert status == 1 and "its runs have measured 1 common images, and two are needed" in said
    assert compare_runs.main(["--rank", str(tmp_path), str(tmp_path)]) == 1


def test_differences_by_which_losses_may_not_be_comparable_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_run(tmp_path, "a", by_digest(1.0, 2.0, 3.0), 8, validation_seed=1, loss_type="l2", learning_rate=1.0)
    write_run(tmp_path, "b", by_digest(1.1, 2.2, 3.1), 9, validation_seed=2, loss_type="huber", learning_rate=2.0)
    status, _ = rank(tmp_path, capsys)
    said = caplog.text
    assert status == 0 and "measured after different steps: 8, 9" in said and "different validation seeds" in said
    assert "--loss_type differs between the runs" in said and "learning_rate" not in said


# index.html, which lists all runs of a folder.


def add_run(folder: Path, name: str, num_lines: int | None = None, num_steps: int = 20) -> Record:
    record = Record()
    for line in lines_of(whole_run(num_steps, name))[:num_lines]:
        record.add(line)
    write_whole(folder / f"{name}-report.html", build_report(record))
    return record


def test_the_index_lists_runs_with_state_loss_preview_and_link(tmp_path: Path) -> None:
    writer = IndexWriter(tmp_path / "cat-report.html")
    complete_run = add_run(tmp_path, "cat")
    writer.close()
    assert not (tmp_path / FILE_NAME).exists()  # a single run needs no index
    writer = IndexWriter(tmp_path / "dog-report.html")
    add_run(tmp_path, "dog", num_lines=9)
    writer.take(lines_of([start("dog"), plan(20)]))
    runs = {run["name"]: run for run in read_data((tmp_path / FILE_NAME).read_text(encoding="utf-8"))["runs"]}
    assert {name: run["state"] for name, run in runs.items()} == {"cat": "finished", "dog": "running, or killed"}
    assert (
        runs["cat"]["loss"] == complete_run.loss
        and runs["cat"]["best"] == complete_run.best
        and runs["dog"]["picture"] is None
    )
    assert (
        runs["cat"]["picture"] == complete_run.previews.items[-1]["pictures"]["0"] and runs["cat"]["prompt"] == "a cat"
    )
    assert runs["dog"]["file"] == "dog-report.html" and runs["dog"]["step"] == 2


def test_the_index_lists_the_folders_directly_below_too(tmp_path: Path) -> None:
    for folder in ("my cat", "dog", "dog/deeper"):
        (tmp_path / folder).mkdir()
    add_run(tmp_path / "my cat", "mycat")
    write_index(IndexedRuns(tmp_path))
    assert not (tmp_path / FILE_NAME).exists()
    add_run(tmp_path / "dog", "dog")
    add_run(tmp_path / "dog" / "deeper", "deeper")
    write_index(IndexedRuns(tmp_path))
    assert {name: run["file"] for name, run in index_of(tmp_path).items()} == {
        "mycat": "my cat/mycat-report.html",
        "dog": "dog/dog-report.html",
    }


def index_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {run["name"]: run for run in read_data((folder / FILE_NAME).read_text(encoding="utf-8"))["runs"]}


def test_the_index_follows_the_report_and_reads_no_other_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of hours is not shown as it began, and a hundred other runs take no time."""
    add_run(tmp_path, "cat")
    now, path, lines = [0.0], tmp_path / "dog-report.html", lines_of(whole_run(30, "dog"))
    sinks = [ReportWriter(path, None, clock=lambda: now[0]), IndexWriter(path)]
    begin = next(i for i, line in enumerate(lines) if line["event"] == "plan") + 1
    read: list[str] = []
    monkeypatch.setattr(index, "read_report", lambda path: read.append(path.name) or read_report(path))
    for until, seconds, step in ((begin, 0.0, 0), (6, 29.0, 0), (6, 31.0, None), (None, 90.0, 30)):
        now[0] = seconds
        for sink in sinks:
            sink.take(lines[:until])
        expected = read_report(path).step
        assert index_of(tmp_path)["dog"]["step"] == expected and (step is None or step == expected)
        lines = lines[until or 0 :]
    assert read.count("cat-report.html") == 1 and read.count("dog-report.html") == 3


def test_an_index_of_another_program_is_not_overwritten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_run(tmp_path, "cat")
    add_run(tmp_path, "dog")
    (tmp_path / FILE_NAME).write_text("<html>mine</html>")
    writer = IndexWriter(tmp_path / "cow-report.html")
    for num_steps in (5, 10):
        add_run(tmp_path, "cow", num_steps=num_steps)
        writer.close()
    assert caplog.text.count("was not written") == 1
    assert (tmp_path / FILE_NAME).read_text() == "<html>mine</html>" and "not a report index" in caplog.text


def test_a_damaged_report_is_omitted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat", "dog"):
        add_run(tmp_path, name)
    (tmp_path / "cow-report.html").write_text("cut off")
    write_index(IndexedRuns(tmp_path))
    assert len(read_data((tmp_path / FILE_NAME).read_text(encoding="utf-8"))["runs"]) == 2
    assert "cow-report.html is not a report" in caplog.text


@browser.in_browser
def test_the_index_opens_in_a_browser(tmp_path: Path) -> None:
    add_run(tmp_path, "cat")
    path = tmp_path / "mean-report.html"
    record = Record()
    for line in lines_of(whole_run(20, EVIL)):
        record.add(line)
    write_whole(path, build_report(record))
    write_index(IndexedRuns(tmp_path))
    script = """
      const rows = [...document.querySelectorAll("tr")].slice(1);
      const link = (row) => row.querySelector("a").getAttribute("href");
      return rows.map((row) => [link(row), row.querySelectorAll("img").length, short(2.5e-6)]);
    """
    answer, browser_log = chromium.ask((tmp_path / FILE_NAME).read_text(encoding="utf-8"), script, tmp_path / "browser")
    assert browser_log == [] and sorted(answer) == [["cat-report.html", 1, "2.5e-6"], ["mean-report.html", 1, "2.5e-6"]]
