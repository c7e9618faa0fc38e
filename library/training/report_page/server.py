"""Serves a folder's reports to a browser on this machine, read-only, and live during a run."""

import re
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from library.errors import UserError
from library.training.report_page.index import FILE_NAME
from library.training.report_page.page import ENDING
from library.training.report_page.writer import LIVE_S, build_report, read_events, read_report

HOST = "127.0.0.1"  # reports contain paths and options that other machines must not read
LOCAL = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?")  # host names that pages of other sites cannot use


class ReportServer(ThreadingHTTPServer):
    """Serves the page of one file, or the overview and the reports of a folder. `port` 0 selects a free one.

    Raises UserError if there is nothing to serve, or if the port is taken.
    """

    daemon_threads = True

    def __init__(self, source: Path, port: int) -> None:
        if not source.exists():
            raise UserError(f"{source} does not exist; name a report, an events file, or the folder of a run")
        pages(source)
        try:
            super().__init__((HOST, port), partial(Handler, source))
        except OSError as error:
            raise UserError(f"--port {port} cannot be opened: {error.strerror}; use another one") from error

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"


def pages(source: Path) -> dict[str, Path]:
    """Return the files to serve by their names in the address ("" is the first page). Raises UserError without any."""
    if not source.is_dir():
        return {"": source}
    files = {path.name: path for path in sorted(source.glob(f"*{ENDING}"))}
    if not files:
        raise UserError(f"{source} has no report yet; start the run first, or name another folder")
    if (source / FILE_NAME).is_file():
        files[FILE_NAME] = source / FILE_NAME
    return {"": files.get(FILE_NAME) or next(iter(files.values())), **files}


def page_at(path: Path) -> str:
    """Return the current page; that of an events file is rebuilt, and that of a running training reloads itself."""
    if path.name == FILE_NAME:
        return path.read_text(encoding="utf-8")
    record = read_report(path) if path.suffix == ".html" else read_events(path)
    is_over = bool(record.sessions) and record.sessions[-1]["end"] is not None
    return build_report(record, None if is_over else LIVE_S)


class Handler(BaseHTTPRequestHandler):
    """Answers GET requests for the pages of a source."""

    def __init__(self, source: Path, *arguments: Any) -> None:
        self.source = source
        super().__init__(*arguments)

    def do_GET(self) -> None:
        if not LOCAL.fullmatch(self.headers.get("Host", "")):
            return self.send_error(403, "Only for browsers on this machine")
        try:
            # Listed anew for each request, because reports appear while the server runs.
            content = page_at(pages(self.source)[self.path.lstrip("/")]).encode()
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
