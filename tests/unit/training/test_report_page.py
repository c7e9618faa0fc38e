"""The page of a report, without a browser, and thinning the recorded values of long runs."""

import base64
import hashlib
import json
import random
import re
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from library.base.atomic_files import write_whole
from library.base.errors import UserError
from library.training.report_page.page import HERE, UPLOT, build_page, read_data
from library.training.report_page.record import Record
from library.training.report_page.thinning import DIGITS, MOST_BUCKETS, Curves, Kept
from library.training.report_page.writer import (
    ReportWriter,
    add_notes,
    add_sheet,
    build_report,
    earlier_record,
    read_report,
)
from tests.event_lines import EVIL, lines_of, plan, start, thumbnail, whole_run


class Elements(HTMLParser):
    """A parser that collects elements and scripts as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] and self.tags[-1][0] == "script":
            self.scripts.append(data)


def record_of_run(num_steps: int = 30, name: str = "cat") -> Record:
    record = Record()
    for line in lines_of(whole_run(num_steps, name)):
        record.add(line)
    return record


def test_foreign_texts_are_embedded_only_as_data() -> None:
    record = record_of_run(name=EVIL)
    page = build_report(record)
    elements = Elements(page)
    tags = [tag for tag, _ in elements.tags]
    assert tags.count("script") == 4 and "img" not in tags and tags.count("title") == 1
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)
    assert read_data(page) == json.loads(json.dumps(record.as_json()))
    assert read_data(page)["prompts"]["1"]["prompt"] == EVIL


def test_the_page_fetches_nothing_and_runs_only_its_own_scripts() -> None:
    elements = Elements(build_report(record_of_run()))
    assert [name for _, attributes in elements.tags for name in attributes if name in ("src", "href")] == []
    (policy,) = (a["content"] for _, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy")
    allowed = set(re.findall(r"'sha256-([^']+)'", unescape(policy or "")))
    scripts = [text for text in elements.scripts[1:] if text.strip()]  # the first script holds the data
    assert {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts} == allowed
    assert (policy or "").startswith("default-src 'none'; img-src data:;")


@pytest.mark.parametrize("name", UPLOT)
def test_uplot_matches_its_recorded_digest(name: str) -> None:
    digest = hashlib.sha256((HERE / name).read_bytes()).hexdigest()
    assert f"`{digest}`" in (HERE / "uplot" / "README.md").read_text()
    assert "Permission is hereby granted, free of charge" in (HERE / "uplot" / "LICENSE").read_text()


def test_the_page_is_written_at_the_start_every_30_s_and_at_the_end(tmp_path: Path) -> None:
    now, path = [0.0], tmp_path / "out" / "cat-report.html"
    writer = ReportWriter(path, None, clock=lambda: now[0])
    lines = lines_of(whole_run(30))
    plan = next(i for i, line in enumerate(lines) if line["event"] == "plan")

    def step_shown() -> int:
        return read_report(path).step

    writer.take(lines[:plan])
    assert not path.exists()
    writer.take(lines[plan : plan + 5])
    assert step_shown() == 3
    now[0] = 29.9
    writer.take(lines[plan + 5 : plan + 9])
    assert step_shown() == 3
    now[0] = 30.0
    writer.take(lines[plan + 9 : plan + 13])
    assert step_shown() == 5
    writer.take(lines[plan + 13 :])
    writer.close()
    assert path.read_text(encoding="utf-8") == build_report(record_of_run(30))
    assert [file.name for file in path.parent.iterdir()] == ["cat-report.html"]


@pytest.mark.parametrize(
    "content",
    ["", "<html></html>", build_page("x", "report.js", {"version": 99}), build_page("x", "report.js", {"a": 1})],
)
def test_a_file_that_is_not_a_report_is_warned_about_and_replaced(content: str, tmp_path: Path, caplog: Any) -> None:
    path = tmp_path / "cat-report.html"
    assert earlier_record(path) is None and caplog.text == ""
    path.write_text(content)
    assert earlier_record(path) is None
    assert f"{path} is not a report of this version" in caplog.text
    with pytest.raises(UserError, match="is not a report"):
        read_report(path)


def test_a_contact_sheet_is_added_to_the_report_and_kept_when_the_run_resumes(tmp_path: Path) -> None:
    path, lines = tmp_path / "cat-report.html", lines_of(whole_run(30))
    write_whole(path, build_report(record_of_run(30)))
    add_sheet(path, thumbnail(7))
    assert read_report(path).sheet == thumbnail(7)
    writer = ReportWriter(path, earlier_record(path))
    writer.take(lines_of([start(), plan(40, first_step=30)]))
    assert read_report(path).sheet == thumbnail(7)
    writer = ReportWriter(path, earlier_record(path))
    writer.take(lines)  # from the beginning: it shows removed steps
    assert read_report(path).sheet is None


def test_what_train_py_says_is_kept_in_the_report(tmp_path: Path) -> None:
    path = tmp_path / "cat-report.html"
    write_whole(path, build_report(record_of_run(30)))
    add_notes(path, {"Plan": ["photos 3"]}, [thumbnail(1)], {"Files": thumbnail(7)})
    record = read_report(path)
    assert (record.notes, record.photos, record.sheets) == (
        {"Plan": ["photos 3"]},
        [thumbnail(1)],
        {"Files": thumbnail(7)},
    )


def test_a_page_that_somebody_edited_is_kept_and_the_report_goes_beside_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, lines = tmp_path / "cat-report.html", lines_of(whole_run(30))
    edited = build_report(record_of_run(30)).replace("<body", "<body data-mine", 1)
    path.write_text(edited, encoding="utf-8")
    add_sheet(path, thumbnail(7))
    writer = ReportWriter(path, earlier_record(path))
    writer.take(lines)
    assert path.read_text(encoding="utf-8") == edited and "cat-report-rescued.html instead" in caplog.text
    assert read_report(tmp_path / "cat-report-rescued.html").step == 30


def test_a_report_that_cannot_be_written_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(13, "open in another program", "cat-report.html")

    now, path = [0.0], tmp_path / "cat-report.html"
    writer = ReportWriter(path, None, clock=lambda: now[0])
    with monkeypatch.context() as locked:
        locked.setattr("library.training.report_page.writer.write_whole", refuse)
        for _ in range(3):
            writer.take(lines_of([plan(10)]))
            now[0] += 31
    assert not path.exists() and caplog.text.count("trying again later") == 1
    writer.take(lines_of([plan(10)]))
    assert path.exists()


# Thinning the recorded values of long runs.


@pytest.mark.parametrize("num_steps", [7, MOST_BUCKETS, MOST_BUCKETS + 1, 13_577])
def test_buckets_hold_mean_minimum_and_maximum_of_their_steps(num_steps: int) -> None:
    """Compare with all values at once; resuming from a report in between changes nothing."""
    rng = random.Random(num_steps)
    values = {step: rng.lognormvariate(0, 2) for step in range(1, num_steps + 1) if rng.random() > 0.05}
    curves, stop = Curves(), rng.randrange(1, num_steps)
    for step in range(1, num_steps + 1):
        curves.add(step, {"loss": values.get(step), "rate": 0.5})
        if step == stop:
            curves = Curves.from_json(json.loads(json.dumps(curves.as_json())))
    column = curves.as_json()["columns"]["loss"]
    width, length = curves.width, len(column["total"])
    assert (length <= MOST_BUCKETS and width == 1) or length > MOST_BUCKETS // 2 - 1
    for bucket in range(length):
        bucket_values = [values[step] for step in range(bucket * width + 1, (bucket + 1) * width + 1) if step in values]
        if not bucket_values:
            assert column["total"][bucket] is None
            continue
        near = pytest.approx
        assert column["total"][bucket] == near(sum(bucket_values), rel=len(bucket_values) * 10 ** (1 - DIGITS))
        if width > 1:
            bucket_limits = column["low"][bucket], column["high"][bucket], column["count"][bucket]
            assert bucket_limits == (
                near(min(bucket_values), rel=10 ** (1 - DIGITS)),
                near(max(bucket_values), rel=10 ** (1 - DIGITS)),
                len(bucket_values),
            )
    rates = curves.as_json()["columns"]["rate"]
    assert ("low" in rates) == (width > 1)


def test_steps_after_a_cut_are_dropped() -> None:
    curves = Curves()
    for step in range(1, 31):
        curves.add(step, {"loss": float(step)})
    curves.cut(12)
    assert curves.by_name["loss"].total == [float(step) for step in range(1, 13)]
    curves.add(13, {"loss": 99.0})
    assert curves.by_name["loss"].total[-1] == 99.0
    curves.cut(0)
    assert curves.by_name["loss"].total == []


@pytest.mark.parametrize("count", [1, 5, 6, 40, 1001])
def test_a_list_keeps_the_first_the_last_and_evenly_spaced_items(count: int) -> None:
    thinned = Kept(limit=5)
    for step in range(count):
        thinned.add({"step": step})
        assert thinned.items[-1]["step"] == step and thinned.items[0]["step"] == 0 and len(thinned.items) <= 5
        thinned = Kept.from_json(5, json.loads(json.dumps(thinned.as_json())))
    steps = [item["step"] for item in thinned.items]
    assert len(steps) == min(count, 5) or len(steps) >= 3
    distances = {b - a for a, b in pairwise(steps[:-1])}
    assert len(distances) <= 1, "all but the last are equally far apart"
