"""Keeps a run's report up to date, and builds it from an events file."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from library.base.atomic_files import write_whole
from library.base.errors import UserError, error_in, of_file
from library.base.json_text import parse_json
from library.checkpoints.overwriting import find_place
from library.training.report_page.page import REPORT, build_page, read_data, report_kind
from library.training.report_page.record import Record
from library.training.reporting.event_checks import check_line

logger = logging.getLogger(__name__)

EVERY_S = 30.0  # from the end of one write to the start of the next
LIVE_S = 10  # the same with --report_live, and the page's reload interval
SCRIPT = "report.js"


class ReportWriter:
    """An event sink that writes the report: when training begins, at most every 30 s, and at the end. A live report is
    written every 10 s and reloads itself until the run ends.

    It works in the thread of the events, so training never waits for it.
    """

    name = "the report"

    def __init__(
        self, path: Path, record: Record | None, is_live: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`record` is that of the resumed run; None for a new run."""
        self.path = path
        self._record = Record() if record is None else record
        self._goes_on = record is not None
        self._began = False  # False before a resumed run has removed temporary files of killed ones
        self._is_reported = False  # whether a write error was logged
        self._reload_s = LIVE_S if is_live else None
        self._clock = clock
        self._due = 0.0

    def take(self, lines: Sequence[Mapping[str, Any]]) -> None:
        for line in lines:
            self._record.add(line)
        self._began = self._began or any(line["event"] == "plan" for line in lines)
        if self._began and self._clock() >= self._due:
            self._write()

    def close(self) -> None:
        self._reload_s = None
        if self._began or self._goes_on:
            self._write()

    def _write(self) -> None:
        """Write the page. If it cannot be written (open in another program, or a full disk), try again when due."""
        try:
            self.path = find_place(self.path, report_kind(self._record.name))
            write_whole(self.path, build_report(self._record, self._reload_s))
        except OSError as error:
            if not self._is_reported:
                logger.warning("%s cannot be written; trying again later: %s", self.path, error)
            self._is_reported = True
        self._due = self._clock() + (self._reload_s or EVERY_S)


def add_sheet(path: Path, image: str) -> None:
    """Add a contact sheet (a data: URL) to the report of a finished run. Raises UserError for another file."""
    record = read_report(path)
    record.sheet = image
    write_whole(find_place(path, REPORT), build_report(record))


def add_notes(path: Path, notes: Mapping[str, list[str]], photos: list[str], sheets: dict[str, str]) -> None:
    """Add what train.py says, some photos, and sheets by title (data: URLs). Raises UserError for another file."""
    record = read_report(path)
    record.notes, record.photos, record.sheets = dict(notes), photos, sheets
    write_whole(find_place(path, REPORT), build_report(record))


def add_event(path: Path, line: Mapping[str, Any]) -> None:
    """Add an event after a run to its report. Raises UserError for another file."""
    record = read_report(path)
    record.add(line)
    write_whole(find_place(path, REPORT), build_report(record))


def build_report(record: Record, reload_s: int | None = None) -> str:
    """Build the page of a run; it reloads every `reload_s` seconds."""
    return build_page(record.name, SCRIPT, record.as_json(), reload_s)


def check_regular(path: Path) -> None:
    """Raise UserError for a pipe or device, which might never end."""
    if path.exists() and not path.is_file():
        raise of_file(path)("is not a regular file", "name a report or a file of --log_events")


def read_report(path: Path) -> Record:
    """Read the record of a report. Raises UserError for another file."""
    check_regular(path)
    try:
        return Record.from_json(read_data(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise of_file(path, cause="unreadable")(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise of_file(path)(f"is not a report of this version: {error}") from error


def read_events(path: Path) -> Record:
    """Read the lines of an events file, without an incomplete last line.

    Raises UserError naming the first line that is not an event.
    """
    check_regular(path)
    try:
        with path.open(encoding="utf-8") as file:
            return collect_record(file, str(path))
    except OSError as error:
        raise of_file(path, cause="unreadable")(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise of_file(path)(f"is no file of events: {error}") from error


def collect_record(lines: Iterable[str], source: str) -> Record:
    """Build the record of lines that come from `source`."""
    record = Record()
    for number, line in enumerate(lines, 1):
        if not line.endswith("\n"):
            break
        try:
            event = check_line(parse_json(line, allow_nan=False))
        except ValueError as error:
            raise error_in(path=source, place=f"line {number}", cause="unreadable")(
                f"{source}: line {number} is not an event: {error}"
            ) from error
        record.add(event)
    return record


def earlier_record(path: Path) -> Record | None:
    """Read the record of a resumed run; None, with a warning, if the file is something else."""
    if not path.exists():
        return None
    try:
        return read_report(path)
    except UserError as error:
        logger.warning("%s; the report starts over", error)
        return None
