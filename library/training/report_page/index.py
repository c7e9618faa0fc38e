"""index.html: all runs of an output folder and of those directly below it on one page, with links to their reports."""

import logging
import stat
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from library.base.atomic_files import write_whole
from library.base.errors import UserError
from library.checkpoints.overwriting import check_target
from library.training.report_page.page import ENDING, INDEX, build_page
from library.training.report_page.record import Record, Session
from library.training.report_page.writer import read_report

logger = logging.getLogger(__name__)

FILE_NAME = "index.html"
MOST_RUNS = 100  # the latest ones; a report may hold megabytes of previews


Stamp = tuple[int, int]


def read_stamp(path: Path) -> Stamp | None:
    """Return (time, size) of a file; None for anything else."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size) if stat.S_ISREG(status.st_mode) else None


class IndexWriter:
    """Writes the index of a folder whenever it finds the report of its run rewritten; comes after that report's
    writer."""

    name = "the index of runs"

    def __init__(self, report: Path) -> None:
        self.report = report
        self._stamp = read_stamp(report)  # at the last index; that of an earlier run is no reason to write one
        self._runs = IndexedRuns(report.parent)
        self._is_reported = False  # whether a problem was logged

    def take(self, lines: Sequence[Mapping[str, Any]]) -> None:
        self.close()

    def close(self) -> None:
        stamp = read_stamp(self.report)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            write_index(self._runs)
        except (OSError, UserError) as error:
            if not self._is_reported:
                logger.warning("%s was not written: %s", self.report.with_name(FILE_NAME), error)
            self._is_reported = True


class IndexedRuns:
    """The runs of a folder, of which only those are read again whose report has changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._by_path: dict[Path, tuple[Stamp, dict[str, Any] | None]] = {}  # None if it is no report

    def summarize(self) -> list[dict[str, Any]]:
        """Return the summaries of the latest runs, latest first; logs reports that cannot be read once."""
        found = {path: read_stamp(path) for path in list_reports(self.folder).values()}
        stamps = {path: stamp for path, stamp in found.items() if stamp is not None}
        latest = sorted(stamps, key=lambda path: stamps[path], reverse=True)[:MOST_RUNS]
        old = self._by_path
        self._by_path = {
            path: old[path]
            if path in old and old[path][0] == stamps[path]
            else (stamps[path], read_summary(path, path.relative_to(self.folder).as_posix()))
            for path in latest
        }
        return [summary for _, summary in self._by_path.values() if summary is not None]


def list_reports(folder: Path) -> dict[str, Path]:
    """Return the reports in a folder and in those directly below it, by their links."""
    found = (path for pattern in (f"*{ENDING}", f"*/*{ENDING}") for path in sorted(folder.glob(pattern)))
    return {path.relative_to(folder).as_posix(): path for path in found if path.is_file()}


def read_summary(path: Path, link: str) -> dict[str, Any] | None:
    """Return the summary of a run; None, with a warning, if its report cannot be read."""
    try:
        return summarize(read_report(path), link)
    except UserError as error:
        logger.warning("%s; it is not part of %s", error, FILE_NAME)
        return None


def build_index(runs: IndexedRuns, reload_s: int | None = None) -> str:
    """Build the page of a folder's runs; it reloads every `reload_s` seconds."""
    title = f"Runs in {runs.folder.resolve().name}"
    return build_page(title, "index.js", {"title": title, "runs": runs.summarize()}, reload_s)


def write_index(runs: IndexedRuns) -> None:
    """Write the index of a folder with at least two reports. Raises UserError if another program's index.html
    exists."""
    if len(list_reports(runs.folder)) >= 2:
        check_target("index of the runs:", runs.folder / FILE_NAME, INDEX)
        write_whole(runs.folder / FILE_NAME, build_index(runs))


def summarize(record: Record, link: str) -> dict[str, Any]:
    end = record.sessions[-1]["end"] if record.sessions else None
    number, image = find_last_preview(record)
    return {
        "name": record.name,
        "file": link,
        "state": "running, or killed" if end is None else end["reason"],
        "step": record.step,
        "max_train_steps": None if record.plan is None else record.plan["max_train_steps"],
        "loss": record.loss,
        "best": record.best,
        "prompt": record.prompts.get(number, {}).get("prompt", ""),
        "picture": image,
        "updated": record.updated,
        "base": name_base(record),
        "seconds": sum(map(partial(measure_seconds, record), record.sessions)),
    }


def name_base(record: Record) -> str:
    """Return the file or name of the base model; "" before training began."""
    options = record.sessions[-1]["options"] if record.sessions else {}
    path = str(options.get("pretrained_model_name_or_path") or "")
    return PurePath(path.replace("\\", "/")).name or str((record.plan or {}).get("base_model", ""))


def measure_seconds(record: Record, session: Session) -> float:
    """Return how long a process of a run took; until its last event for one that runs, or was killed last."""
    if session["end"] is not None:
        return float(session["end"]["seconds"])
    return max(0.0, record.updated - session["time"]) if session is record.sessions[-1] else 0.0


def find_last_preview(record: Record) -> tuple[str, str | None]:
    """Return (prompt number, data: URL) of the first of the latest previews; ("", None) without previews."""
    for item in reversed(record.previews.items):
        if images := sorted(item["pictures"].items(), key=lambda pair: int(pair[0])):
            number, image = images[0]
            return number, image
    return "", None
