"""index.html, which lists all runs of a folder."""

from pathlib import Path

import pytest

from library.training.report_page.index import FILE_NAME, IndexWriter
from library.training.report_page.page import read_data
from library.training.report_page.record import Record
from library.training.report_page.writer import build_report, write_page
from tests import browser
from tests.event_lines import EVIL, lines_of, plan, start, whole_run


def add_run(folder: Path, name: str, num_lines: int | None = None, num_steps: int = 20) -> Record:
    record = Record()
    for line in lines_of(whole_run(num_steps, name))[:num_lines]:
        record.add(line)
    write_page(folder / f"{name}-report.html", build_report(record))
    return record


def test_the_index_lists_runs_with_state_loss_preview_and_link(tmp_path: Path) -> None:
    complete_run = add_run(tmp_path, "cat")
    IndexWriter(tmp_path).close()
    assert not (tmp_path / FILE_NAME).exists()  # a single run needs no index
    add_run(tmp_path, "dog", num_lines=9)
    IndexWriter(tmp_path).take(lines_of([start("dog"), plan(20)]))
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


def test_an_index_of_another_program_is_not_overwritten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_run(tmp_path, "cat")
    add_run(tmp_path, "dog")
    (tmp_path / FILE_NAME).write_text("<html>mine</html>")
    IndexWriter(tmp_path).close()
    assert (tmp_path / FILE_NAME).read_text() == "<html>mine</html>" and "not a report index" in caplog.text


def test_a_damaged_report_is_omitted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("cat", "dog"):
        add_run(tmp_path, name)
    (tmp_path / "cow-report.html").write_text("cut off")
    IndexWriter(tmp_path).close()
    assert len(read_data((tmp_path / FILE_NAME).read_text(encoding="utf-8"))["runs"]) == 2
    assert "cow-report.html is not a report" in caplog.text


@pytest.mark.skipif(browser.CHROMIUM is None, reason="Chromium is not installed")
def test_the_index_opens_in_a_browser(tmp_path: Path) -> None:
    add_run(tmp_path, "cat")
    path = tmp_path / "mean-report.html"
    record = Record()
    for line in lines_of(whole_run(20, EVIL)):
        record.add(line)
    write_page(path, build_report(record))
    IndexWriter(tmp_path).close()
    script = """
      const rows = [...document.querySelectorAll("tr")].slice(1);
      const link = (row) => row.querySelector("a").getAttribute("href");
      return rows.map((row) => [link(row), row.querySelectorAll("img").length, short(2.5e-6)]);
    """
    answer, browser_log = browser.ask((tmp_path / FILE_NAME).read_text(encoding="utf-8"), script, tmp_path / "browser")
    assert browser_log == [] and sorted(answer) == [["cat-report.html", 1, "2.5e-6"], ["mean-report.html", 1, "2.5e-6"]]
