"""What train.py shows while it trains, and what goes to its log file."""

import io
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from library.base.errors import UserError
from library.train_photos.screen import LogFile, Screen, logging_to
from library.training.failures import interruption
from library.training.planning.run_duration import RunDuration

PLANNED = RunDuration(loading=5, caching=10, step=1.0, num_steps=100, previews=20, validation=0, saving=0, sheets=30)


def list_events(seconds_per_step: float) -> list[dict[str, Any]]:
    """Return the events of 100 steps with a file and previews of three prompts every 25."""
    events: list[dict[str, Any]] = [{"event": "plan", "max_train_steps": 100, "first_step": 0}]
    for step in range(101):
        if step:
            events.append({"event": "step", "step": step, "time": 1000 + seconds_per_step * step})
        if step % 25 == 0:
            if step:
                events.append(
                    {"event": "saved", "kind": "weights", "reason": "step", "step": step, "file": f"{step}.st"}
                )
                events.append({"event": "saved", "kind": "state", "reason": "step", "step": step, "file": f"{step}"})
            events += [
                {"event": "preview", "step": step, "prompt": f"prompt {index}", "file": f"{step}_{index}.png"}
                for index in range(3)
            ]
    return [*events, {"event": "saved", "kind": "weights", "reason": "end", "step": 100, "file": "mine.safetensors"}]


def test_a_run_of_100_steps_has_ten_lines_with_its_bar() -> None:
    stream = io.StringIO()
    with Screen(stream, PLANNED) as screen:
        screen.take(list_events(0.5))
        screen.close()
        screen.show_stage("drawing")
    lines = [line for line in stream.getvalue().replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert lines[0] == "preview   step 0: prompt 0: 0_0.png" and lines[-1] == "file      step 100: mine.safetensors"
    assert len(lines) == 9 and sum(line.startswith("preview") for line in lines) == 5


def test_after_20_steps_the_bar_counts_on_with_the_measured_time() -> None:
    stream = io.StringIO()
    with Screen(stream, PLANNED) as screen:
        events = list_events(2.0)
        screen.take([event for event in events if event.get("step", 0) <= 20])
        assert screen.seconds_left == pytest.approx(0.8 * (100 + 20) + 30)
        screen.take([event for event in events if 20 < event.get("step", 0) <= 25])
        assert screen.seconds_left == pytest.approx(0.75 * (200 + 20) + 30)


def test_planned_parts_sum_up() -> None:
    assert PLANNED.seconds == 5 + 10 + 100 + 20 + 30
    assert max(PLANNED.parts, key=lambda name: PLANNED.parts[name]) == "training"


def test_output_goes_to_the_log_and_errors_to_the_terminal_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger, path = logging.getLogger("a module"), tmp_path / "mine.log"
    before = logging.getLogger().handlers[:]
    for number in range(2):  # a run that goes on appends
        with logging_to(path):
            print(f"plain text {number}")
            sys.stderr.write("\r50 %")
            sys.stderr.write("\n")
            logger.warning("unseen")
            logger.error("wrong \x1b[31m")
            logging.getLogger(interruption.__name__).warning("SIGINT received")
    assert logging.getLogger().handlers == before
    assert path.read_text() == "plain text 0\nplain text 1\n"
    shown = capsys.readouterr()
    assert shown.out == "" and "unseen" not in shown.err and "50 %" not in shown.err
    assert "ERROR: wrong \\x1b[31m" in shown.err and "SIGINT received" in shown.err


def test_a_file_that_is_no_log_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine.log").write_bytes(b"\0\1")
    with pytest.raises(UserError, match="the log of this run"):
        LogFile.open(tmp_path / "mine.log")
