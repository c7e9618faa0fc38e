"""A report's record, built from events."""

import json
import random
from typing import Any

import pytest

from library.base.errors import UserError
from library.training.report_page.record import Record
from library.training.report_page.writer import collect_record
from library.training.reporting import events
from tests.event_lines import EVIL, lines_of, plan, preview, saved, start, step, validation, whole_run


def folded(lines: list[dict[str, Any]], record: Record | None = None) -> Record:
    record = record or Record()
    for line in lines:
        record.add(line)
    return record


@pytest.mark.parametrize("num_steps", [30, 2300])
def test_a_saved_record_continues_as_the_one_in_memory(num_steps: int) -> None:
    lines = lines_of(whole_run(num_steps, seed=3))
    uninterrupted = folded(lines)
    rng = random.Random(5)
    for stop in rng.sample(range(len(lines)), 4):
        half = json.loads(json.dumps(folded(lines[:stop]).as_json()))
        assert folded(lines[stop:], Record.from_json(half)).as_json() == uninterrupted.as_json()


def test_fields_of_a_later_version_are_ignored() -> None:
    values = Record().as_json()
    later = {**values, "new": 1, "smoothed": {**values["smoothed"], "new": 1}}
    assert Record.from_json(later).as_json() == values


def test_the_smoothed_loss_is_an_exponentially_weighted_average() -> None:
    rng = random.Random(1)
    losses = [rng.random() for _ in range(50)]
    event_list = [plan(400), *(step(i + 1, rng, loss) for i, loss in enumerate(losses))]
    record = folded(lines_of(event_list))
    assert record.smoothed.over == 20
    weights = [(1 - 1 / 20) ** (49 - i) for i in range(50)]
    expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    assert record.loss == pytest.approx(expected, rel=1e-12)
    missing = folded(lines_of([step(51, rng, float("nan"))]), record)
    assert missing.loss == record.loss and missing.step == 51


def test_the_scores_of_a_step_are_means_with_standard_errors_of_the_values_that_are_finite() -> None:
    many = {str(number): [1.0] for number in range(100)}
    lines = lines_of([events.Scores(5, 1, {"a": [1.0, float("nan"), 4.0, 7.0], "b": [float("nan")], **many})])
    (item,) = folded(lines).scores.items
    assert item["scores"]["a"] == {"mean": 4.0, "error": pytest.approx(3 / 3**0.5)}
    assert item["scores"]["b"] == {"mean": None, "error": None} and item["scores"]["0"] == {"mean": 1.0, "error": None}
    assert len(item["scores"]) == 8
    resumed = folded(lines_of([start(), plan(100, first_step=4)]), folded(lines))
    assert resumed.scores.items == []


def test_a_resumed_run_drops_lost_steps_and_keeps_the_rest() -> None:
    rng = random.Random(2)
    killed = [start(), events.Warned("warning", "x", "first"), plan(100), *(step(i, rng) for i in range(1, 31))]
    killed += [validation(10, 0.3, (10, 0.3)), preview(10, 0, "a cat"), validation(30, 0.2, (30, 0.2))]
    killed += [preview(30, 0, "a cat"), saved(20)]
    resumed = [start(), events.Warned("warning", "x", "second"), plan(100, first_step=20)]
    resumed += [step(i, rng) for i in range(21, 26)]
    record = folded(lines_of(killed) + lines_of(resumed, started=1.9e9))
    assert len(record.curves.by_name["loss"].total) == 25 and record.step == 25
    assert (
        [item["step"] for item in record.validations.items] == [10] == [item["step"] for item in record.previews.items]
    )
    assert [item["step"] for item in record.files] == [20]
    assert [item["first_step"] for item in record.sessions] == [0, 20]
    assert [item["text"] for item in record.warnings] == ["first", "second"]


def test_a_run_from_the_beginning_drops_earlier_runs_of_the_same_file() -> None:
    first, second = lines_of(whole_run(40, "dog")), lines_of(whole_run(30, seed=4), started=1.9e9)
    assert folded(first + second).as_json() == folded(second).as_json()


def test_deleted_or_overwritten_files_are_listed_once() -> None:
    event_list = [saved(10), saved(20), saved(5, "best", "b"), saved(30), saved(25, "best", "b")]
    event_list.append(events.Removed("out/cat-step00000010.safetensors"))
    record = folded(lines_of(event_list))
    assert [(file["step"], file["name"]) for file in record.files] == [
        (20, "cat-step00000020.safetensors"),
        (30, "cat-step00000030.safetensors"),
        (25, "b"),
    ]
    assert record.num_removed == 1


def test_stage_durations_are_summed_by_name() -> None:
    event_list = [
        start(),
        *[events.StageProgress("previews", state, i, 4) for i in range(3) for state in ("begin", "progress", "end")],
    ]
    event_list.append(events.StageProgress("validation steps", "begin", 0, 9))
    record = folded(lines_of(event_list))
    assert record.stages == {"previews": [6.0, 3]}
    assert folded(lines_of([start()]), record).stages == {}


def test_warnings_are_counted_and_their_list_is_bounded() -> None:
    event_list = [events.Warned("warning", "x", "again")] * 5
    event_list += [events.Warned("error", "x", str(i)) for i in range(300)]
    record = folded(lines_of(event_list))
    assert record.warnings[0]["count"] == 5 and len(record.warnings) == 100 and record.num_warnings_left_out == 201


@pytest.mark.parametrize("url", ["https://example.org/a.webp", f"data:image/webp;base64,{EVIL}", "javascript:alert(1)"])
def test_invalid_image_urls_are_dropped(url: str) -> None:
    (line,) = lines_of([preview(1, 0, "a cat")])
    assert folded([{**line, "thumbnail": url}]).previews.items == []


@pytest.mark.parametrize("line", ["[1]", "{}", "no json", '{"event": "step", "time": 1}', '"start"'])
def test_a_line_that_is_not_an_event_is_named(line: str) -> None:
    good = json.dumps(lines_of([start()])[0])
    with pytest.raises(UserError, match=r"events\.jsonl: line 2 is not an event"):
        collect_record([good + "\n", line + "\n"], "events.jsonl")
    collect_record([good + "\n", line], "events.jsonl")  # cut off by a kill
