"""All runs with a report in the output folder, whoever started them, and how two of them differ."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.train_photos.record import Record
from library.training.report_page.comparison import build_comparison
from library.training.report_page.index import IndexedRuns, list_reports
from library.training.report_page.page import ENDING


@dataclass
class History:
    """The runs below a folder, of which only those are read again whose report has changed."""

    folder: Path
    _runs: IndexedRuns = field(init=False)

    def __post_init__(self) -> None:
        self._runs = IndexedRuns(self.folder)

    def list_all(self) -> list[dict[str, Any]]:
        """Return the latest runs as their index has them, with the trigger of those of train.py."""
        return [{**run, "trigger": read_trigger(self.folder / run["file"])} for run in self._runs.summarize()]

    def build(self, files: Sequence[str]) -> str | None:
        """Return the report of a run, or the comparison of several; None for a name that is not listed.

        Raises UserError for runs that cannot be compared.
        """
        known = list_reports(self.folder)
        if not files or not known.keys() >= {*files}:
            return None
        paths = [known[name] for name in files]
        return paths[0].read_text(encoding="utf-8") if len(paths) == 1 else build_comparison(paths)


def read_trigger(report: Path) -> str:
    record = Record.read(report.with_name(f"{report.name.removesuffix(ENDING)}.toml"))
    return "" if record is None else record.trigger
