"""The event stream: a separate thread passes events to their sinks, so that a step never waits for a disk."""

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, Protocol

from library.base.error_lines import ErrorFields
from library.base.errors import about
from library.base.json_text import InvalidJson, parse_json
from library.base.progress import State
from library.checkpoints.overwriting import FileKind, check_target, known_by_start
from library.training.reporting.events import (
    End,
    EndCause,
    EndReason,
    Event,
    Planned,
    StageProgress,
    Start,
    Step,
    TrainingPlan,
    Warned,
)

logger = logging.getLogger(__name__)

FLAG = "--log_events"
EVENT_LOG = known_by_start("an event log", lambda start: start.startswith(b'{"v":'))  # the start of `Event.as_line`
RUN_NAMES = ("output_name", "output_dir")  # options that tell the logs of two runs apart
PROGRESS_S = 1.0  # seconds between progress events of a stage

Line = dict[str, Any]
"""An event as JSON."""


class Sink(Protocol):
    """Stores events. Both methods are called from the thread of `Events` only."""

    name: str

    def take(self, lines: Sequence[Line]) -> None: ...
    def close(self) -> None: ...


class Events:
    """Emits a run's events; an event costs microseconds, and nothing without sinks.

    A failing sink is dropped with one warning: events never end a run.
    """

    def __init__(self, sinks: Sequence[Sink] = (), clock: Callable[[], float] = time.time) -> None:
        self._sinks = list(sinks)
        self._clock = clock
        self._queue: SimpleQueue[Line | threading.Event | None] = SimpleQueue()
        self._process = os.getpid()
        self._progress: dict[str, float] = {}
        self._started = clock()
        self.last_step: int | None = None
        self.planned: Planned | None = None  # added to the plan event
        self.summary: str | None = None  # this and the next two are added to the last event
        self.file: str | None = None
        self.cause: EndCause | None = None
        self._thread: threading.Thread | None = None
        if self._sinks:
            self._thread = threading.Thread(target=self._work, name="events", daemon=True)
            self._thread.start()

    @property
    def is_on(self) -> bool:
        return self._thread is not None

    def emit(self, event: Event) -> None:
        """Queue an event; events of forked processes are dropped."""
        # A forked loader process inherits the queue, but not the thread that empties it.
        if self._thread is None or os.getpid() != self._process:
            return
        if isinstance(event, Step):
            self.last_step = event.step
        elif isinstance(event, TrainingPlan):
            self.last_step = event.first_step
        self._queue.put(event.as_line(self._clock()))

    def tell_progress(self, name: str, state: State, done: int, total: int) -> None:
        """Emit the progress of long work about once a second; see library/base/progress.py."""
        now = self._clock()
        if state == "progress" and now - self._progress.get(name, 0.0) < PROGRESS_S:
            return
        self._progress[name] = now
        self.emit(StageProgress(name, state, done, total))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Report the block as a stage of the run."""
        self.emit(StageProgress(name, "begin"))
        try:
            yield
        finally:
            self.emit(StageProgress(name, "end"))

    def end(self, reason: EndReason, error: str | None = None, details: ErrorFields | None = None) -> None:
        """Emit the last event of a run; later events are dropped."""
        seconds = round(self._clock() - self._started, 3)
        self.emit(End(reason, self.last_step, seconds, error, self.summary, self.file, details, self.cause))
        self.close()

    def flush(self, timeout_s: float = 10.0) -> None:
        """Wait until all queued events are stored."""
        if self._thread is not None and self._thread.is_alive() and os.getpid() == self._process:
            is_kept = threading.Event()
            self._queue.put(is_kept)
            is_kept.wait(timeout_s)

    def close(self) -> None:
        """Store all queued events and end the thread."""
        thread, self._thread = self._thread, None
        if thread is not None and os.getpid() == self._process:
            self._queue.put(None)
            thread.join()

    # Run in the thread:

    def _work(self) -> None:
        is_open = True
        while is_open:
            queued = [self._queue.get()]
            while not self._queue.empty():
                queued.append(self._queue.get())
            is_open = None not in queued
            # Converted in this thread: a step costs the training 19 microseconds, and this thread 9.
            lines = [plain(item) for item in queued if isinstance(item, dict)]
            if lines:
                self._each(lambda sink: sink.take(lines))  # noqa: B023, it is called at once
            for item in queued:
                if isinstance(item, threading.Event):
                    item.set()
        self._each(lambda sink: sink.close())

    def _each(self, act: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                act(sink)
            except Exception as error:  # a full disk or a closed pipe does not concern training
                self._sinks.remove(sink)
                logger.warning("%s is dropped, training continues: %s: %s", sink.name, type(error).__name__, error)
                logger.debug("where it failed:", exc_info=error)


def plain(value: Any) -> Any:
    """Convert a value to JSON types; non-finite numbers become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    return str(value)


class JsonLines:
    """Writes one JSON object per line, in ASCII, several lines at a time."""

    def __init__(self, file: IO[str], name: str, closes: bool) -> None:
        self.name = name
        self._file, self._closes = file, closes

    def take(self, lines: Sequence[Line]) -> None:
        encoded = (json.dumps(line, allow_nan=False, separators=(",", ":")) for line in lines)
        self._file.write("".join(f"{text}\n" for text in encoded))
        self._file.flush()

    def close(self) -> None:
        if self._closes:
            self._file.close()


def log_kind(run: Mapping[str, Any]) -> FileKind:
    """Return the kind of the event logs of a run with these RUN_NAMES."""

    def is_own(path: Path) -> bool:
        if not EVENT_LOG.is_own(path):
            return False
        try:
            with path.open(encoding="ascii", errors="replace") as file:
                line = parse_json(file.readline())
        except InvalidJson:  # the first line of a log that a full disk cut
            return True
        options = line.get("options") if isinstance(line, dict) and line.get("event") == Start.event else None
        return not isinstance(options, dict) or all(options.get(name) == run.get(name) for name in RUN_NAMES)

    return FileKind(f"an event log of a run named {run.get('output_name') or 'last'} in this --output_dir", is_own)


def open_event_file(path: Path, goes_on: bool, run: Mapping[str, Any] | None = None) -> JsonLines:
    """Open the events file: append after its last complete line if the run `goes_on`, else truncate it.

    Raises UserError for a file with other content, or of another run than that with these RUN_NAMES, and for one that
    cannot be written.
    """
    try:
        check_target(FLAG, path, EVENT_LOG if goes_on or run is None else log_kind(run))
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            with path.open("rb+") as file:
                file.truncate(end_of_last_line(file) if goes_on else 0)
        return JsonLines(path.open("a", encoding="ascii", newline="\n"), f"{FLAG} {path}", closes=True)
    except OSError as error:
        raise about(FLAG, path)(f"cannot be written: {error.strerror}") from error


def end_of_last_line(file: IO[bytes]) -> int:
    """Return the length of a file without an incomplete last line, as a killed process may leave it."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        position = file.read(end - start).rfind(b"\n")
        if position >= 0:
            return start + position + 1
        end = start
    return 0


class WarningEvents(logging.Handler):
    """Emits logged warnings and errors as events; those logged before the events open are buffered."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._waiting: list[Warned] = []
        self._events: Events | None = None

    def emit(self, record: logging.LogRecord) -> None:
        event = Warned(record.levelname.lower(), record.name, record.getMessage())
        if self._events is None:
            self._waiting.append(event)
        else:
            self._events.emit(event)

    def kept(self) -> tuple[Warned, ...]:
        return tuple(self._waiting)

    def close(self) -> None:
        """End the events: logging shuts down before the run only if another thread is ending the process."""
        super().close()
        if self._events is not None:
            self._events.end("stopped")

    def connect(self, events: Events) -> None:
        """Send warnings to these events from now on."""
        self._events = events
        for event in self._waiting:
            events.emit(event)
        self._waiting.clear()


@contextmanager
def capture_warnings() -> Iterator[WarningEvents]:
    """Collect what is logged inside the block."""
    handler = WarningEvents()
    logging.getLogger().addHandler(handler)
    try:
        yield handler
    finally:
        logging.getLogger().removeHandler(handler)
