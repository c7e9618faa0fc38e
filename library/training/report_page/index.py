"""index.html: all runs of an output folder on one page, with links to their reports."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from library.checkpoints.overwriting import check_target
from library.errors import UserError
from library.training.report_page.page import ENDING, INDEX, TITLES, build_page
from library.training.report_page.record import Record
from library.training.report_page.writer import read_report, write_page

logger = logging.getLogger(__name__)

FILE_NAME = "index.html"
MOST_RUNS = 100  # the latest ones; a report may hold megabytes of previews


class IndexWriter:
    """Writes the index at the start and at the end of a run, after its report."""

    name = "the index of runs"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, lines: Sequence[Mapping[str, Any]]) -> None:
        if any(line["event"] == "plan" for line in lines):
            self.close()

    def close(self) -> None:
        try:
            write_index(self.folder)
        except (OSError, UserError) as error:
            logger.warning("%s was not written: %s", self.folder / FILE_NAME, error)


def write_index(folder: Path) -> None:
    """Write the index of a folder with at least two reports. Raises UserError if another program's index.html
    exists."""
    reports = sorted(folder.glob(f"*{ENDING}"), key=lambda path: path.stat().st_mtime_ns, reverse=True)[:MOST_RUNS]
    if len(reports) < 2:
        return
    check_target("index of the runs:", folder / FILE_NAME, INDEX)
    runs = []
    for path in reports:
        try:
            runs.append(summarize(read_report(path), path))
        except UserError as error:
            logger.warning("%s; it is not part of %s", error, FILE_NAME)
    title = TITLES["index"] + folder.resolve().name
    write_page(folder / FILE_NAME, build_page(title, "index.js", {"title": title, "runs": runs}))


def summarize(record: Record, path: Path) -> dict[str, Any]:
    end = record.sessions[-1]["end"] if record.sessions else None
    number, image = find_last_preview(record)
    return {
        "name": record.name,
        "file": path.name,
        "state": "running, or killed" if end is None else end["reason"],
        "step": record.step,
        "max_train_steps": None if record.plan is None else record.plan["max_train_steps"],
        "loss": record.loss,
        "best": record.best,
        "prompt": record.prompts.get(number, {}).get("prompt", ""),
        "picture": image,
        "updated": record.updated,
    }


def find_last_preview(record: Record) -> tuple[str, str | None]:
    """Return (prompt number, data: URL) of the first of the latest previews; ("", None) without previews."""
    for item in reversed(record.previews.items):
        if images := sorted(item["pictures"].items(), key=lambda pair: int(pair[0])):
            number, image = images[0]
            return number, image
    return "", None
