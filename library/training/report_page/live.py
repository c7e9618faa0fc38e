"""Serves a folder's reports to a browser on this machine, read-only, and live during a run."""

from pathlib import Path

from library.base.errors import error_in
from library.training.report_page.index import FILE_NAME, IndexedRuns, build_index, list_reports
from library.training.report_page.local_server import LocalServer
from library.training.report_page.writer import LIVE_S, build_report, check_regular, read_events, read_report


class ReportServer(LocalServer):
    """Serves the page of one file, or the overview and the reports of a folder and of those directly below it. `port` 0
    selects a free one.

    Raises UserError if there is nothing to serve, or if the port is taken.
    """

    def __init__(self, source: Path, port: int) -> None:
        if not source.exists():
            raise error_in(path=source, cause="missing")(
                f"{source} does not exist", "name a report, an events file, or the folder of a run"
            )
        pages = ReportPages(source)
        pages.list_reports()
        super().__init__(pages, port)


class ReportPages:
    """The pages of a source. This suite builds each of them: no file of the folder is served as it is."""

    is_over = False  # until Ctrl-C

    def __init__(self, source: Path) -> None:
        self.source = source
        self._runs = IndexedRuns(source)

    def list_reports(self) -> dict[str, Path]:
        """Return the files to show by name, anew because reports appear while the server runs. Raises UserError
        without any."""
        if not self.source.is_dir():
            check_regular(self.source)
            return {self.source.name: self.source}
        reports = list_reports(self.source)
        if not reports:
            raise error_in(path=self.source, cause="missing")(
                f"{self.source} has no report yet", "start the run first, or name another folder"
            )
        return reports

    def build(self, name: str) -> str:
        """Return a page as it is now; that of a running training reloads itself. Raises KeyError without this page."""
        reports = self.list_reports()
        if name in ("", FILE_NAME):
            if len(reports) > 1:
                return build_index(self._runs, LIVE_S)
            (name,) = reports
        path = reports[name]
        record = read_report(path) if path.suffix == ".html" else read_events(path)
        is_over = bool(record.sessions) and record.sessions[-1]["end"] is not None
        return build_report(record, None if is_over else LIVE_S)
