"""Differences between runs, and resolving which runs are compared."""

import json
from pathlib import Path

import pytest

from library.base.atomic_files import write_whole
from library.base.errors import UserError
from library.training.report_page.comparison import differences, is_measured_alike, label_runs, read_run
from library.training.report_page.record import Record
from library.training.report_page.writer import build_report
from library.training.reporting.events import Event
from tests.event_lines import EVIL, audit, lines_of, plan, start, whole_run
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
