"""The screen of train.py while it trains: one bar, and a line for each round of previews and each file. All else that
the script writes goes to a log file."""

import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from library.base.terminal import EscapedTexts, print_line
from library.checkpoints.overwriting import FileKind, check_target
from library.training.command_line.console import CONSOLE, PlainFormatter, is_log
from library.training.failures import interruption
from library.training.planning.run_duration import RunDuration
from library.training.reporting.console_lines import duration

LOG = FileKind("the log of a run", is_log)
NUM_MEASURED = 20  # steps
UNPLANNED = RunDuration(loading=0, caching=0, step=0, num_steps=1, previews=0, validation=0, saving=0, sheets=0)
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"


class Screen:
    """A sink of the events of a run, which it shows on `stream`."""

    name = "the progress bar"

    def __init__(self, stream: TextIO, planned: RunDuration | None) -> None:
        self._stream, self._planned = stream, planned or UNPLANNED
        self._first = 0, 0.0  # a step, and when it was finished
        self._step_s: float | None = None  # measured
        self.seconds_left: float | None = None
        self._bar: Any = tqdm(total=0, desc="loading", file=stream, bar_format=BAR, dynamic_ncols=True)
        self._previewed = -1  # the step of the last line about previews

    def take(self, lines: Sequence[Mapping[str, Any]]) -> None:
        for line in lines:
            show = {"plan": self._plan, "step": self._step, "preview": self._preview, "saved": self._saved}
            if line["event"] in show:
                show[line["event"]](line)

    def show_stage(self, name: str) -> None:
        """Say what goes on when no steps are trained."""
        self._bar.set_description_str(name)

    def close(self) -> None:
        """Keep the bar: drawing follows the run."""

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _plan(self, line: Mapping[str, Any]) -> None:
        self._planned = replace(self._planned, num_steps=line["max_train_steps"])
        self._bar.reset(total=line["max_train_steps"])
        self._bar.set_description_str("training")
        self._bar.update(line["first_step"])
        self._first = line["first_step"], 0.0

    def _step(self, line: Mapping[str, Any]) -> None:
        step, (first, since) = line["step"], self._first
        if not since:
            self._first = step, line["time"]  # the first step compiles and fills caches
        elif step - first == NUM_MEASURED:
            self._step_s = (line["time"] - since) / NUM_MEASURED
        if self._planned.step or self._step_s:
            self.seconds_left = self._planned.seconds_left(step, self._step_s or self._planned.step)
            self._bar.set_postfix_str(f"{duration(self.seconds_left)} left", refresh=False)
        self._bar.update(step - self._bar.n)

    def _preview(self, line: Mapping[str, Any]) -> None:
        if line["step"] != self._previewed:  # the others of the round are beside it
            self._previewed = line["step"]
            self._write(f"preview   step {line['step']}: {line['prompt']}: {line['file']}")

    def _saved(self, line: Mapping[str, Any]) -> None:
        is_copy = line["step"] == self._bar.total and line["reason"] != "end"  # of the last file
        if line["kind"] == "weights" and not is_copy:
            self._write(f"file      step {line['step']}: {line['file']}")

    def _write(self, text: str) -> None:
        with tqdm.external_write_mode(file=self._stream):
            print_line(text, self._stream)


class LogFile(io.TextIOWrapper):
    """A log file to append to, which leaves out the many states of progress bars."""

    @classmethod
    def open(cls, path: Path) -> "LogFile":
        """Open it. Raises UserError for a file that is no log."""
        check_target("the log of this run:", path, LOG)
        path.parent.mkdir(parents=True, exist_ok=True)
        return cls(path.open("ab"), encoding="utf-8", errors="backslashreplace", line_buffering=True)

    is_at_start = True  # of a line

    def write(self, text: str, /) -> int:
        is_of_bar = "\r" in text or "\x1b[A" in text or (self.is_at_start and not text.strip())
        if not is_of_bar:
            self.is_at_start = text.endswith("\n")
            super().write(text)
        return len(text)


def is_for_people(record: logging.LogRecord) -> bool:
    """Return True for errors, and for answers to Ctrl-C."""
    return record.levelno >= logging.ERROR or record.name == interruption.__name__


@contextmanager
def logging_to(path: Path) -> Iterator[TextIO]:
    """Write what the block prints and logs to a file, and errors to standard error too, which the block is given."""
    screen, root = sys.stderr, logging.getLogger()
    errors = logging.StreamHandler(screen)
    errors.setFormatter(PlainFormatter())
    errors.addFilter(EscapedTexts())
    errors.addFilter(is_for_people)
    file = LogFile.open(path)
    before = root.handlers[:]
    root.handlers[:] = [*(handler for handler in before if not (handler.name or "").startswith(CONSOLE)), errors]
    try:
        with redirect_stdout(file), redirect_stderr(file):
            yield screen
    finally:
        # The script has added handlers of its own, which write to the file.
        root.handlers[:] = before
        file.close()
