"""Who may ask the page's server for what, and for how long: checked for every request, before any view."""

import asyncio
import hmac
import ipaddress
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from http.cookies import SimpleCookie
from typing import Any
from urllib.parse import parse_qs

from uvicorn.protocols.http.h11_impl import H11Protocol

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

UPLOAD_PATH = "/api/upload/"
SHOWN_ALONE = ("report",)  # views that other programs' files are shown by, which get the page's frame and no more
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A report runs its own scripts in an origin of its own, without this page's token.
REPORT_POLICY = "sandbox allow-scripts; frame-ancestors 'self'"
EMPTY_PAGE = '<!doctype html><link rel="icon" href="data:,">'  # else browsers may ask for an icon before they go on
HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


@dataclass(frozen=True)
class Limits:
    """The bounds of one request."""

    body_bytes: int = 2_000_000
    upload_bytes: int = 200_000_000
    idle_s: float = 20.0  # for the next part of a request, and for a client to take the next part of an answer
    num_connections: int = 1000  # each takes a few kB, and no thread


@dataclass(frozen=True)
class Gate:
    """The rules of a server."""

    hosts: frozenset[str]  # values of the Host header; empty if it listens to other machines
    port: int
    token: str
    report_key: str  # opens reports, which send no cookie when they reload themselves in an origin of their own
    limits: Limits = Limits()

    @property
    def cookie(self) -> str:
        """The cookie's name; browsers send cookies to all ports of a host."""
        return f"page_token_{self.port}"

    def knows_host(self, host: str) -> bool:
        """Return True for a Host header that no page of another site can send."""
        if self.hosts:
            return host in self.hosts
        name, _, port = host.rpartition(":")
        if port != str(self.port):
            return False
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name in ("localhost", socket.gethostname(), f"{socket.gethostname()}.local")
        return True

    def is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self.token.encode())

    def is_owner(self, scope: Message, cookies: Iterable[str]) -> bool:
        """Return True for the browser that the address with the token was opened in, and for a report in it."""
        if scope["method"] == "GET" and shows_report(scope["path"]):
            key = read_query(scope, "key")
            return hmac.compare_digest(key.encode(), self.report_key.encode())
        return self.is_token(read_cookie(cookies, self.cookie))

    def refuse(self, scope: Message) -> tuple[int, str] | None:
        """Return status and reason if a request is not allowed; None if it is."""
        headers = list_headers(scope)
        if len(headers.get("host", ())) != 1 or not self.knows_host(host := headers["host"][0]):
            return 403, "host"
        if any(origin != f"http://{host}" for origin in headers.get("origin", ())):
            return 403, "origin"
        # A report that reloads itself counts as another site's; its frame is of this page, see REPORT_POLICY.
        is_navigation = headers.get("sec-fetch-mode") == ["navigate"]
        from_elsewhere = headers.get("sec-fetch-site", ["none"])[-1] in ("cross-site", "same-site")
        if from_elsewhere and not (is_navigation and scope["method"] == "GET"):
            return 403, "origin"
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return 405, "method"
        if not self.is_owner(scope, headers.get("cookie", ())):
            return 401, "cookie"
        if scope["method"] == "POST" and not self.is_token("".join(headers.get("x-page-token", ()))):
            return 403, "token"
        length = headers.get("content-length", ["0"])
        if len(length) != 1 or not length[0].isdecimal() or len(length[0]) > 15:
            return 400, "length"
        return (413, "size") if int(length[0]) > self.most_bytes(scope) else None

    def most_bytes(self, scope: Message) -> int:
        is_upload = scope["path"].startswith(UPLOAD_PATH)
        return self.limits.upload_bytes if is_upload else self.limits.body_bytes


def list_headers(scope: Message) -> dict[str, list[str]]:
    headers: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return headers


def read_cookie(values: Iterable[str], name: str) -> str:
    cookies = SimpleCookie("; ".join(values))
    return str(cookies[name].value) if name in cookies else ""


def read_query(scope: Message, name: str) -> str:
    return str(parse_qs(scope["query_string"].decode("latin-1")).get(name, [""])[0])


def shows_report(path: str) -> bool:
    return path.rpartition("/")[2] in SHOWN_ALONE


class TooLarge(Exception):
    """A request has more bytes than are allowed."""


class Guard:
    """Lets through the requests that its gate allows, bounds their bodies, and adds the headers of safety."""

    def __init__(self, app: App, gate: Gate) -> None:
        self.app, self.gate = app, gate

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            raise RuntimeError("the page has no web sockets")
        refused = self.gate.refuse(scope)
        if refused is not None:
            return await self.answer_refused(scope, *refused, send=send)

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *headers_for(scope["path"])]
            await send(message)

        return await self.app(scope, self.bounded(scope, receive), send_safely)

    async def answer_refused(self, scope: Message, status: int, reason: str, send: Send) -> None:
        """Say why, or take the token that the address of a first visit has."""
        is_first = scope["method"] == "GET" and scope["path"] == "/" and self.gate.is_token(read_query(scope, "token"))
        if reason != "cookie":
            return await answer(send, status, reason)
        if not is_first:
            return await answer(send, status, "Open the address that `python3 tools/start.py page` prints.")
        cookie = f"{self.gate.cookie}={self.gate.token}; HttpOnly; SameSite=Strict; Path=/"
        # No redirect: browsers would send it without the cookie, since the first address came from elsewhere.
        own = [(b"set-cookie", cookie.encode()), (b"refresh", b"0; url=/")]
        return await answer(send, 200, EMPTY_PAGE, own, "text/html")

    def bounded(self, scope: Message, receive: Receive) -> Receive:
        """Return a receive that raises TooLarge, and TimeoutError for a client that stops sending."""
        most, received = self.gate.most_bytes(scope), 0
        is_whole = False

        async def receive_bounded() -> Message:
            nonlocal received, is_whole
            if is_whole:  # then it waits until the client hangs up
                return await receive()
            message = await asyncio.wait_for(receive(), self.gate.limits.idle_s)
            received += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if received > most:
                raise TooLarge
            return message

        return receive_bounded


def headers_for(path: str) -> list[tuple[bytes, bytes]]:
    policy = REPORT_POLICY if shows_report(path) else POLICY
    headers = {**HEADERS, "content-security-policy": policy}
    return [(name.encode(), value.encode()) for name, value in headers.items()]


async def answer(
    send: Send, status: int, text: str, headers: Iterable[tuple[bytes, bytes]] = (), kind: str = "text/plain"
) -> None:
    body = text.encode()
    own = [(b"content-type", f"{kind}; charset=utf-8".encode()), (b"content-length", str(len(body)).encode())]
    # Whatever of the request was not read must not be taken for the next one.
    own.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers_for("/"), *headers]})
    await send({"type": "http.response.body", "body": body})


def hang_up(transport: Any) -> None:
    """End a connection at once; without this option the system would keep what is not sent yet for a client that
    never reads."""
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


def limited_protocol(limits: Limits) -> type[H11Protocol]:
    """Return uvicorn's protocol that hangs up on clients that send no whole request, or do not read the answer."""

    class LimitedProtocol(H11Protocol):
        """Bounds what uvicorn does not: the time of a request's head and of a client that reads nothing."""

        _request_timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.num_connections:
                hang_up(transport)
                return
            self._request_timer = self.loop.call_later(limits.idle_s, hang_up, transport)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            awaits_head = self.cycle is None or self.cycle.response_complete
            if not awaits_head and self._request_timer is not None:
                self._request_timer.cancel()
                self._request_timer = None
            elif awaits_head and self._request_timer is None:
                self._request_timer = self.loop.call_later(limits.idle_s, hang_up, self.transport)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_timer = self.loop.call_later(limits.idle_s, hang_up, self.transport)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._write_timer is not None:
                self._write_timer.cancel()

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._request_timer, self._write_timer):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

    return LimitedProtocol
