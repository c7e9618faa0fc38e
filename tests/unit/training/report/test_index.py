"""index.html, which lists all runs of a folder."""

from pathlib import Path
from typing import Any

import pytest

from library.base.atomic_files import write_whole
from library.training.report_page import index
from library.training.report_page.index import FILE_NAME, IndexedRuns, IndexWriter, write_index
from library.training.report_page.page import read_data
from library.training.report_page.record import Record
from library.training.report_page.writer import ReportWriter, build_report, read_report
from tests import browser
from tests.event_lines import EVIL, lines_of, plan, start, whole_run


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
    answer, browser_log = browser.ask((tmp_path / FILE_NAME).read_text(encoding="utf-8"), script, tmp_path / "browser")
    assert browser_log == [] and sorted(answer) == [["cat-report.html", 1, "2.5e-6"], ["mean-report.html", 1, "2.5e-6"]]
