"""Event files and reports that were edited, damaged or fabricated."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.base.errors import UserError
from library.training.report_page.comparison import build_comparison
from library.training.report_page.page import build_page
from library.training.report_page.record import Record
from library.training.report_page.writer import build_report, read_events
from tests.event_lines import lines_of, whole_run
from tests.fuzz.budget import any_input, works_or_says_why

LINES = lines_of(whole_run(6))
JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 10**400, 1e308, float("nan"), "", "\ud800", "x" * 3000, [], {}, [[]], {"a": {}}, [None],
    -(2**63),
)  # fmt: skip


def mutate(value: Any, rng: random.Random, junk: Any) -> Any:
    """Return a copy with one value at any depth replaced, dropped or duplicated."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.2:
        return junk
    copy = dict(value) if isinstance(value, dict) else list(value)
    key = rng.choice(list(copy) if isinstance(copy, dict) else range(len(copy)))
    if rng.random() < 0.1:
        del copy[key]
    else:
        copy[key] = mutate(copy[key], rng, junk)
    return copy


@pytest.mark.slow
@given(seed=st.integers(0, 2**32), junk=st.sampled_from(JUNK), number=st.integers(0, len(LINES) - 1))
@any_input(150)
def test_any_change_of_an_event_works_or_gives_an_error(seed: int, junk: Any, number: int, tmp_path: Path) -> None:
    lines = [*LINES]
    lines[number] = mutate(lines[number], random.Random(seed), junk)
    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    works_or_says_why(lambda: build_report(read_events(path)))
    works_or_says_why(lambda: build_comparison([path, path]))


@given(seed=st.integers(0, 2**32), junk=st.sampled_from(JUNK))
@any_input(150)
def test_any_change_of_a_report_works_or_gives_an_error(seed: int, junk: Any, tmp_path: Path) -> None:
    record = Record()
    for line in LINES:
        record.add(line)
    content = json.dumps(mutate(json.loads(json.dumps(record.as_json())), random.Random(seed), junk))
    page, placeholder = build_page("cat", "report.js", {"DATA": 0}), '{"DATA":0}'
    assert page.count(placeholder) == 1
    path = tmp_path / "cat-report.html"
    path.write_text(page.replace(placeholder, content.replace("<", "\\u003c")))
    works_or_says_why(lambda: build_comparison([path, path]))


@pytest.mark.parametrize(
    "line", ["[" * 100_000, '{"event": "start", "time": 1, "options": []}', '{"event": "start"}', "3"]
)
def test_lines_that_are_not_events_give_an_error(line: str, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match="line 1 is not an event: "):
        read_events(path)
