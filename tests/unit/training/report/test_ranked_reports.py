"""Ranking the runs of a folder by their reports, which may come from several machines."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from library.base.atomic_files import write_whole
from library.training.report_page.record import Record
from library.training.report_page.writer import build_report
from tests.event_lines import lines_of, plan, start, validation
from tools import compare_runs


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
