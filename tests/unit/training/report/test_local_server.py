"""The server of reports and votes with clients that misbehave."""

import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from types import SimpleNamespace

import pytest

from library.training.report_page import local_server
from library.training.report_page.local_server import MOST_CONNECTIONS, Handler, LocalServer

TAKEN: list[Mapping[str, str]] = []


@pytest.fixture
def server() -> Iterator[LocalServer]:
    pages = SimpleNamespace(is_over=False, build=lambda name: "page" * 10**6)
    served = LocalServer(pages, 0, lambda fields: TAKEN.append(fields) is None)
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    TAKEN.clear()
    yield served
    served.shutdown()
    served.server_close()
    thread.join()


def connect(server: LocalServer, request: bytes) -> socket.socket:
    client = socket.create_connection(server.server_address[:2])
    client.sendall(request)
    return client


def post(length: str) -> bytes:
    return f"POST / HTTP/1.0\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "x", "", "4097", "\u0663"])
def test_a_length_that_is_none_is_refused(server: LocalServer, length: str, capfd: pytest.CaptureFixture[str]) -> None:
    with connect(server, post(length)) as client:
        assert client.recv(1000).startswith(b"HTTP/1.0 413")
    assert capfd.readouterr().err == "" and TAKEN == []


def test_half_a_form_is_not_taken(server: LocalServer) -> None:
    with connect(server, post("20") + b"choice=a") as client:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1000).startswith(b"HTTP/1.0 400")
    assert TAKEN == []


def test_a_client_that_hangs_up_leaves_no_traceback(server: LocalServer, capfd: pytest.CaptureFixture[str]) -> None:
    client = connect(server, b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert client.recv(10)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # resets the connection
    client.close()
    wait_until_free(server)
    assert capfd.readouterr().err == ""


def wait_until_free(server: LocalServer) -> None:
    for _ in range(MOST_CONNECTIONS):
        server.free_connections.acquire()
    for _ in range(MOST_CONNECTIONS):
        server.free_connections.release()


def test_half_requests_take_a_limited_number_of_threads_for_a_limited_time(
    server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Handler.timeout == local_server.SECONDS
    monkeypatch.setattr(Handler, "timeout", 1.0)
    before = threading.active_count()
    clients = [connect(server, b"GET / HT") for _ in range(MOST_CONNECTIONS + 20)]
    assert threading.active_count() <= before + MOST_CONNECTIONS
    wait_until_free(server)
    with connect(server, b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n") as client:
        assert client.recv(12) == b"HTTP/1.0 200"
    for client in clients:
        client.close()
