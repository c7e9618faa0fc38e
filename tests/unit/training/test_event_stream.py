"""Writing events to files."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from library.options.train import TrainOptions
from library.training.reporting.event_stream import Events, capture_warnings, open_event_file, plain
from library.training.reporting.events import Removed, Saved, StageProgress
from library.training.run.run_events import hide_secrets, open_events
from library.training.saving.names import Names
from tests.running import ROOT
from tests.schemas import EVENTS, PAGES, make_events, to_text

FOREVER = """
import sys
from pathlib import Path
from library.training.reporting.event_stream import Events, open_event_file
from library.training.reporting.events import Removed
events = Events([open_event_file(Path(sys.argv[1]), False)])
print("going", flush=True)
while True:
    events.emit(Removed("x" * 3000))
    events.flush()
"""


class Kept:
    """A sink in memory that fails from the given call on."""

    name = "--log_events here"

    def __init__(self, fails_at: int | None = None) -> None:
        self.lines: list[dict[str, Any]] = []
        self.is_closed = False
        self._fails_at = fails_at

    def take(self, lines: Sequence[dict[str, Any]]) -> None:
        if self._fails_at is not None and len(self.lines) >= self._fails_at:
            raise OSError(28, "No space left on device")
        self.lines += lines

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_schemas_are_those_of_the_classes(path: Path) -> None:
    """`python -m tests.schemas` writes them."""
    assert path.read_text(encoding="utf-8") == to_text(PAGES[path]()) + "\n"


@pytest.mark.parametrize(
    "change", [{}, {"more": 1}, {"num_bytes": -1}, {"kind": "other"}, {"file": None}, {"step": 1.5}, {"epoch": ...}]
)
def test_the_schema_refuses_other_fields_and_values(change: dict[str, Any]) -> None:
    line = {**Saved("weights", "end", 3, 1, "mine.safetensors", 7).as_line(1.0), **change}
    line = {name: value for name, value in line.items() if value is not ...}
    schema = make_events()
    Draft202012Validator.check_schema(schema)
    assert Draft202012Validator(schema).is_valid(line) == (not change)


def test_the_documentation_page_names_every_event() -> None:
    page = (ROOT / "docs" / "events.md").read_text(encoding="utf-8")
    assert all(f"| `{kind.event}` |" in page for kind in EVENTS)


def test_numbers_that_are_not_finite_become_null() -> None:
    value = {"a": (1.5, float("nan")), "b": {"c": float("-inf"), 2: Path("x")}}
    assert plain(value) == {"a": [1.5, None], "b": {"c": None, "2": "x"}}


def test_a_failing_sink_is_dropped_and_others_continue(caplog: pytest.LogCaptureFixture) -> None:
    broken, working = Kept(fails_at=1), Kept()
    events = Events([broken, working])
    for name in ("a", "b", "c"):
        events.emit(Removed(name))
        events.flush()
    events.end("stopped")
    events.emit(Removed("too late"))
    assert [line.get("file") for line in working.lines] == ["a", "b", "c", None] and working.is_closed
    assert [line["file"] for line in broken.lines] == ["a"]
    assert caplog.text.count("is dropped, training continues") == 1


def test_progress_is_sent_once_a_second_but_begin_and_end_always() -> None:
    now, sink = [100.0], Kept()
    events = Events([sink], clock=lambda: now[0])
    events.tell_progress("caching", "begin", 0, 50)
    for done in range(1, 51):
        now[0] += 0.125
        events.tell_progress("caching", "progress", done, 50)
    events.tell_progress("caching", "end", 50, 50)
    events.close()
    assert [line["done"] for line in sink.lines] == [0, 8, 16, 24, 32, 40, 48, 50]
    assert {line["total"] for line in sink.lines} == {50}


def test_earlier_warnings_are_sent_when_events_start() -> None:
    sink = Kept()
    with capture_warnings() as warnings:
        logging.getLogger("library.somewhere").warning("early %d", 1)
        events = Events([sink])
        warnings.connect(events)
        logging.getLogger("library.somewhere").error("late")
        logging.getLogger("library.somewhere").info("no matter")
        events.close()
    warned = [(line["level"], line["logger"], line["text"]) for line in sink.lines]
    assert warned == [("warning", "library.somewhere", "early 1"), ("error", "library.somewhere", "late")]


def test_warnings_of_a_run_without_events_are_not_stored() -> None:
    options, sink = TrainOptions().with_values({"output_dir": "out", "no_report": True}), Kept()
    names = Names.build(options.saving)
    with capture_warnings() as warnings, open_events(options, names, None, warnings) as silent:
        logging.getLogger("library.somewhere").warning("an hour later")
        assert not silent.is_on
        events = Events([sink])
        warnings.connect(events)
        events.close()
    assert sink.lines == []


def test_a_process_ended_by_another_thread_reports_that_it_was_stopped() -> None:
    """`Interruption` does so if the main thread is blocked inside torch; logging is shut down first."""
    sink = Kept()
    with capture_warnings() as warnings:
        warnings.connect(Events([sink]))
        logging.getLogger("library.somewhere").error("SIGINT received")
        ending = threading.Thread(target=warnings.close)
        ending.start()
        ending.join()
    assert [line["event"] for line in sink.lines] == ["warning", "end"] and sink.lines[-1]["reason"] == "stopped"
    assert sink.is_closed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_sends_no_events() -> None:
    sink = Kept()
    events = Events([sink])
    child = os.fork()
    if child == 0:
        events.emit(Removed("of the child"))
        events.close()
        os._exit(0)
    os.waitpid(child, 0)
    events.emit(Removed("of the run"))
    events.close()
    assert [line["file"] for line in sink.lines] == ["of the run"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_second_process_continues_the_lines_of_a_killed_one(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    process = subprocess.Popen([sys.executable, "-c", FOREVER, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"going\n"
    while path.stat().st_size < 100_000:
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    complete_lines = path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1]
    path.write_bytes(complete_lines + b'{"v":1,"event":"remo')  # at worst
    events = Events([open_event_file(path, goes_on=True)])
    events.emit(StageProgress("späte Zeile \ud800", "end"))
    events.close()
    lines = path.read_bytes().splitlines(keepends=True)
    assert b"".join(lines[:-1]) == complete_lines and all(json.loads(line)["v"] == 1 for line in lines)
    assert json.loads(lines[-1])["name"] == "späte Zeile \ud800"


def test_passwords_and_tokens_are_hidden_in_the_command() -> None:
    options = TrainOptions().with_values({"wandb_api_key": "abc", "huggingface_token": "hf_1=2"})
    command = ["--wandb_api_key", "abc", "--huggingface_tok=hf_1=2", "--output_name", "abcd"]
    hidden = ["--wandb_api_key", "***", "--huggingface_tok=***", "--output_name", "abcd"]
    assert hide_secrets(command, options) == hidden
