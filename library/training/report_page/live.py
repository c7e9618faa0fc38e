"""Serves a folder's reports to a browser on this machine, read-only, and live during a run."""

import re
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from library.errors import UserError
from library.training.report_page.index import FILE_NAME, IndexedRuns, build_index
from library.training.report_page.page import ENDING
from library.training.report_page.writer import LIVE_S, build_report, check_regular, read_events, read_report

HOST = "127.0.0.1"  # reports contain paths and options that other machines must not read
MAX_PORT = 65535
LOCAL = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?")  # host names that pages of other sites cannot use


class ReportServer(ThreadingHTTPServer):
    """Serves the page of one file, or the overview and the reports of a folder. `port` 0 selects a free one.

    Raises UserError if there is nothing to serve, or if the port is taken.
    """

    daemon_threads = True

    def __init__(self, source: Path, port: int) -> None:
        if not source.exists():
            raise UserError(f"{source} does not exist; name a report, an events file, or the folder of a run")
        if not 0 <= port <= MAX_PORT:
            raise UserError(f"--port is {port}; use a number from 0 (any free port) to {MAX_PORT}")
        pages = Pages(source)
        pages.list_reports()
        try:
            super().__init__((HOST, port), partial(Handler, pages))
        except OSError as error:
            raise UserError(f"--port {port} cannot be opened: {error.strerror}; use another one") from error

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"


class Pages:
    """The pages of a source. This suite builds each of them: no file of the folder is served as it is."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self._runs = IndexedRuns(source)

    def list_reports(self) -> dict[str, Path]:
        """Return the files to show by name, anew because reports appear while the server runs. Raises UserError
        without any."""
        if not self.source.is_dir():
            check_regular(self.source)
            return {self.source.name: self.source}
        reports = {path.name: path for path in sorted(self.source.glob(f"*{ENDING}")) if path.is_file()}
        if not reports:
            raise UserError(f"{self.source} has no report yet; start the run first, or name another folder")
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


class Handler(BaseHTTPRequestHandler):
    """Answers GET requests for the pages of a source."""

    def __init__(self, pages: Pages, *arguments: Any) -> None:
        self.pages = pages
        super().__init__(*arguments)

    def do_GET(self) -> None:
        if not LOCAL.fullmatch(self.headers.get("Host", "")):
            return self.send_error(403, "Only for browsers on this machine")
        name = unquote(self.path.partition("?")[0]).removeprefix("/")
        try:
            content = self.pages.build(name).encode()
        except KeyError:
            return self.send_error(404)
        except (OSError, UserError) as error:
            return self.send_error(503, "No report at the moment", str(error))
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        # The page of a running training changes every few seconds.
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)
        return None

    def log_message(self, format: str, *arguments: Any) -> None:
        """Do not log requests."""
