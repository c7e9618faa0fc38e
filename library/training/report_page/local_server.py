"""Serves pages to browsers on this machine, and takes the forms that the pages send."""

import io
import re
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import monotonic
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote

from library.base.errors import UserError, about

HOST = "127.0.0.1"  # pages contain paths and options that other machines must not read
MAX_PORT = 65535
LOCAL = re.compile(r"(127\.0\.0\.1|localhost)(:\d+)?")  # host names that pages of other sites cannot use
MOST_FORM_BYTES = 4096
MOST_CONNECTIONS = 64  # each has a thread
SECONDS = 10.0  # for a client to send its request, and to take the answer


class Pages(Protocol):
    """The pages of a server."""

    is_over: bool  # the server stops after the next page

    def build(self, name: str) -> str:
        """Return a page; "" names the first. Raises KeyError without this page."""
        ...


TakeForm = Callable[[Mapping[str, str]], bool]
"""Takes the fields of a form; False for one that none of the pages sent."""


class LocalServer(ThreadingHTTPServer):
    """Serves pages on `port`; 0 selects a free one. Without `take` it is read-only.

    Raises UserError if the port is taken.
    """

    daemon_threads = True

    def __init__(self, pages: Pages, port: int, take: TakeForm | None = None) -> None:
        if not 0 <= port <= MAX_PORT:
            raise about("--port")(f"is {port}", f"use a number from 0 (any free port) to {MAX_PORT}")
        try:
            super().__init__((HOST, port), partial(Handler, pages, take))
        except OSError as error:
            raise about("--port", cause="unreadable")(
                f"{port} cannot be opened: {error.strerror}", "use another one"
            ) from error
        self.free_connections = threading.Semaphore(MOST_CONNECTIONS)

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:
        """Answer in a thread; hang up if all are taken."""
        if self.free_connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free_connections.release()

    def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:
        """Print a traceback, except for clients that hang up or stop reading."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"


class RequestBytes(io.RawIOBase):
    """The bytes of a request that has to arrive within `seconds`, however steadily the client sends."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection, self._seconds, self._end = connection, seconds, monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Read what has come. Raises TimeoutError."""
        left = self._end - monotonic()
        if left <= 0:
            raise TimeoutError
        # A socket's own timeout holds for each read: a byte every nine seconds would keep a thread for hours.
        self._connection.settimeout(left)
        try:
            return self._connection.recv_into(buffer)
        finally:
            self._connection.settimeout(self._seconds)


class Handler(BaseHTTPRequestHandler):
    """Answers GET requests for pages, and POST requests of their forms."""

    timeout = SECONDS

    def __init__(self, pages: Pages, take: TakeForm | None, *arguments: Any) -> None:
        self.pages, self.take = pages, take
        super().__init__(*arguments)

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(RequestBytes(self.connection, self.timeout))

    def do_GET(self) -> None:
        if not self.is_from_here():
            return
        name = unquote(self.path.partition("?")[0]).removeprefix("/")
        try:
            content = self.pages.build(name).encode()
        except KeyError:
            return self.send_error(404)
        except (OSError, UserError) as error:
            return self.send_error(503, "No page at the moment", str(error))
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        # A page changes with the run, or with the form that it sends.
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Frame-Options", "DENY")  # else another site could have it clicked unseen
        self.end_headers()
        self.wfile.write(content)
        if self.pages.is_over:
            self.server.shutdown()
        return None

    def do_POST(self) -> None:
        if not self.is_from_here():
            return
        if self.take is None:
            return self.send_error(501)
        length = self.headers.get("Content-Length", "")
        # Python converts no number of thousands of digits.
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > MOST_FORM_BYTES:
            return self.send_error(413)
        body = self.rfile.read(int(length))
        if len(body) < int(length):  # the client hung up
            return self.send_error(400)
        fields = dict(parse_qsl(body.decode("utf-8", "replace")))
        try:
            is_taken = self.take(fields)
        except (OSError, UserError) as error:
            return self.send_error(503, "Nothing was saved", str(error))
        if not is_taken:
            return self.send_error(403, "Only for forms of this page")
        self.send_response(303)
        self.send_header("Location", "/")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def is_from_here(self) -> bool:
        """Return True for a browser on this machine; else send the error."""
        is_local = LOCAL.fullmatch(self.headers.get("Host", "")) is not None
        if not is_local:
            self.send_error(403, "Only for browsers on this machine")
        return is_local

    def log_message(self, format: str, *arguments: Any) -> None:
        """Do not log requests."""
