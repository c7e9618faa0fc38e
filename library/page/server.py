"""The server: one for a folder, found again by the file that it writes."""

import asyncio
import json
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from library.base.atomic_files import write_whole
from library.base.errors import about, of_file
from library.base.json_text import parse_json
from library.base.terminal import print_line
from library.page.browser import FIRST_PAGE, OWNER_ALONE, show
from library.page.jobs import Trainings
from library.page.live import Live, read_code_version
from library.page.security import App, Gate, Guard, Limits, limited_protocol
from library.page.store import Store
from library.page.views import make_views
from library.training.saving.run_lock import Locked, acquire, release

HOST = "127.0.0.1"
PORT = 8189  # usual; another one if it is taken
MAX_PORT = 65535
NAME = "server.json"
OTHER_S, POLL_S = 10.0, 0.05  # for another server to have written its file
GRACE_S = 1  # for open pages when the server ends


@dataclass(frozen=True)
class Address:
    """Where a server is, as its file says. The file is for the owner alone: it holds the token."""

    url: str
    token: str
    pid: int
    version: str

    @property
    def first_url(self) -> str:
        """The address that gives a browser the cookie without which nothing is answered."""
        return f"{self.url}?token={self.token}"


def read_address(path: Path) -> Address | None:
    try:
        return Address(**parse_json(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def serve(folder: Path, port: int | None, listen: str | None, opens: bool, limits: Limits | None = None) -> int:
    """Serve the page of a folder until Ctrl-C, or show that of the server that does already. Return the exit status.

    Raises UserError if the folder cannot be written or the port is taken.
    """
    store = Store(folder.absolute())
    store.create()
    path, lock = store.own / NAME, store.own / "server.lock"
    try:
        file = acquire(lock, "another server has this folder", "close it, or use another --folder")
    except Locked:
        return show_other(path, opens)
    try:
        path.unlink(missing_ok=True)  # of a server that was killed
        run(store, path, bind(listen or HOST, port), listen, opens, limits or Limits())
    finally:
        for name in (NAME, FIRST_PAGE):
            path.with_name(name).unlink(missing_ok=True)
        if file is not None:
            release(file, lock)
    return 0


def show_other(path: Path, opens: bool) -> int:
    """Show the page of the server that runs. Raises UserError if it does not say where it is."""
    deadline = time.monotonic() + OTHER_S
    while (address := read_address(path)) is None:
        if time.monotonic() > deadline:
            raise of_file(path)("is missing though another page is open", "close that one, and start again")
        time.sleep(POLL_S)
    opening = show("The page is open already: ", address.first_url, path.parent, opens)
    if address.version != read_code_version():
        print_line("It was started before the suite was updated: end it with Ctrl-C where it runs, and start again")
    opening.join(OTHER_S)
    return 0


def bind(host: str, port: int | None) -> socket.socket:
    """Return a socket that is bound; without a port to the usual one, or to a free one if that is taken. Raises
    UserError."""
    if port is not None and not 0 <= port <= MAX_PORT:
        raise about("--port")(f"is {port}", f"use a number from 0 (any free port) to {MAX_PORT}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for choice in (PORT, 0) if port is None else (port,):
        bound = socket.socket(family, socket.SOCK_STREAM)
        if os.name == "posix":  # elsewhere this would take the port of another program
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((host, choice))
            bound.listen()  # before the address is announced
            return bound
        except OSError as error:
            bound.close()
            problem = error
    if port is None:
        raise about("--listen")(f"{host} cannot be used: {problem.strerror}", "use an address of this machine")
    reason = f"{port} cannot be opened: {problem.strerror}; use another one, or leave it out"
    raise about("--port", cause="unreadable")(reason) from None


def run(store: Store, path: Path, bound: socket.socket, listen: str | None, opens: bool, limits: Limits) -> None:
    """Serve until a signal."""
    host, port = bound.getsockname()[:2]
    token = secrets.token_urlsafe(24)
    hosts = frozenset(f"{name}:{port}" for name in (HOST, "localhost"))
    gate = Gate(frozenset() if listen else hosts, port, token, secrets.token_urlsafe(24), limits)
    shown = f"[{host}]" if ":" in host else host
    address = Address(f"http://{shown}:{port}/", token, os.getpid(), read_code_version())

    def announce() -> None:
        write_whole(path, json.dumps(asdict(address)), OWNER_ALONE)
        show("The page is ", address.first_url, path.parent, opens)
        print_line("Ctrl-C ends it, and trainings go on")

    app = build_app(Live(store, Trainings(store)), gate, announce)
    config = uvicorn.Config(
        app,
        http=limited_protocol(limits),
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    with suppress(KeyboardInterrupt):  # which uvicorn raises again after it has ended
        uvicorn.Server(config).run(sockets=[bound])


def build_app(live: Live, gate: Gate, announce: Callable[[], None]) -> App:
    """Return the application behind its guard; `announce` is called when it is ready."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await live.look()
        watching = asyncio.get_running_loop().create_task(live.watch())
        asyncio.get_running_loop().call_soon(announce)
        yield
        watching.cancel()
        live.tasks.close()

    return Guard(Starlette(routes=make_views(live, gate).routes(), lifespan=lifespan), gate)
