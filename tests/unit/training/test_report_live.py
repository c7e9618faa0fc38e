"""tools/report.py --serve: which files it serves, and clients that misbehave."""

import http.client
import os
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest

from library.base.errors import UserError
from library.training.report_page import local_server
from library.training.report_page.index import IndexedRuns, write_index
from library.training.report_page.live import ReportServer
from library.training.report_page.local_server import MOST_CONNECTIONS, Handler, LocalServer
from library.training.report_page.page import read_data
from library.training.report_page.writer import ReportWriter, build_report, read_events
from tests.event_lines import lines_of, plan, start, whole_run
from tools import report

TAG = '<meta http-equiv="refresh" content="10">'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    writer = ReportWriter(tmp_path / "cat-report.html", None)
    writer.take(lines_of([start(), plan(40)]))
    (tmp_path / "secret.txt").write_text("mine")
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[ReportServer]:
    with ReportServer(folder, 0) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def get(server: ReportServer, path: str = "/", method: str = "GET", host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_reloads_only_while_the_run_is_in_progress(server: ReportServer, folder: Path) -> None:
    status, page = get(server)
    assert status == 200 and TAG in page and read_data(page)["step"] == 0
    writer = ReportWriter(folder / "cat-report.html", None)
    writer.take(lines_of(whole_run(30)))
    writer.close()
    status, page = get(server, "/cat-report.html")
    assert status == 200 and TAG not in page and read_data(page)["step"] == 30


@pytest.mark.parametrize(
    "path", ["/secret.txt", "/../secret.txt", "/%2e%2e/secret.txt", "/cat-report.html/../secret.txt"]
)
def test_other_files_are_not_served(path: str, server: ReportServer) -> None:
    assert get(server, path)[0] == 404


def test_the_server_is_read_only_and_answers_only_this_machine(server: ReportServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert get(server, host="evil.example")[0] == 403  # a page of another site, through a host name that it controls
    assert get(server, method="POST")[0] == 501 and get(server, method="DELETE")[0] == 501


def test_events_are_reread_for_every_request(tmp_path: Path) -> None:
    import json

    path = tmp_path / "events.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines_of(whole_run(5))))
    with ReportServer(path, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            assert get(server)[1] == build_report(read_events(path))
        finally:
            server.shutdown()
            thread.join()


def test_serving_errors_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        ReportServer(tmp_path / "gone", 0)
    with pytest.raises(UserError, match="has no report yet"):
        ReportServer(tmp_path, 0)
    (tmp_path / "a-report.html").touch()
    with ReportServer(tmp_path, 0) as first, pytest.raises(UserError, match="use another one"):
        ReportServer(tmp_path, first.server_address[1])


def test_a_live_report_is_written_every_10_s_and_reloads_until_the_end(tmp_path: Path) -> None:
    now, path, lines = [0.0], tmp_path / "cat-report.html", lines_of(whole_run(30))
    writer = ReportWriter(path, None, is_live=True, clock=lambda: now[0])
    begin = next(i for i, line in enumerate(lines) if line["event"] == "plan")
    writer.take(lines[: begin + 5])
    first = path.read_text()
    assert TAG in first and "Content-Security-Policy" in first
    now[0] = 9.9
    writer.take(lines[begin + 5 : begin + 9])
    assert path.read_text() == first
    now[0] = 10.0
    writer.take(lines[begin + 9 :])
    assert TAG in path.read_text() != first
    writer.close()
    assert TAG not in path.read_text()


@pytest.mark.parametrize("name", ["my cat", "猫の絵", "100% cat?", "a+b#c"])
def test_reports_of_any_name_are_served_as_the_index_links_them(server: ReportServer, folder: Path, name: str) -> None:
    file = f"{name}-report.html"
    ReportWriter(folder / file, None).take(lines_of([start(name), plan(7)]))
    runs = read_data(get(server)[1])["runs"]
    assert {run["file"] for run in runs} == {"cat-report.html", file}
    status, page = get(server, f"/{quote(file, safe='')}?from=index")
    assert status == 200 and read_data(page)["plan"]["max_train_steps"] == 7
    assert get(server, "/index.html?again")[0] == 200


def test_the_index_is_built_anew_and_that_of_another_program_is_not_served(server: ReportServer, folder: Path) -> None:
    (folder / "index.html").write_text("<script>steal()</script>")
    assert "steal" not in get(server, "/index.html")[1] + get(server, "/")[1]
    ReportWriter(folder / "dog-report.html", None).take(lines_of([start("dog"), plan(7)]))
    for path in ("/", "/index.html"):
        status, page = get(server, path)
        assert status == 200 and TAG in page and {run["name"] for run in read_data(page)["runs"]} == {"cat", "dog"}
    (folder / "dog-report.html").unlink()
    assert read_data(get(server)[1])["name"] == "cat"


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_that_does_not_exist_is_named(folder: Path, port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(folder), "--serve", "--port", str(port)]) == 1
    assert capsys.readouterr().err == f"error: --port is {port}; use a number from 0 (any free port) to 65535\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_do_not_hang_a_command(folder: Path, server: ReportServer, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(folder / "pipe-report.html")
    assert get(server, "/pipe-report.html")[0] == 404 and get(server)[0] == 200
    write_index(IndexedRuns(folder))
    for words in ([], ["--serve"]):
        assert report.main([str(folder / "pipe-report.html"), *words]) == 1
    assert capsys.readouterr().err.count("pipe-report.html is not a regular file; name a report or a file of") == 2


def test_reports_of_folders_below_are_served_as_the_index_links_them(server: ReportServer, folder: Path) -> None:
    (folder / "my dog").mkdir()
    ReportWriter(folder / "my dog" / "dog-report.html", None).take(lines_of([start("dog"), plan(7)]))
    assert {run["file"] for run in read_data(get(server)[1])["runs"]} == {"cat-report.html", "my dog/dog-report.html"}
    status, page = get(server, "/my%20dog/dog-report.html")
    assert status == 200 and read_data(page)["plan"]["max_train_steps"] == 7
    assert get(server, "/my%20dog/index.html")[0] == 404 and get(server, "/../cat-report.html")[0] == 404


# The server of reports and votes with clients that misbehave.

TAKEN: list[Mapping[str, str]] = []


@pytest.fixture
def started_server() -> Iterator[LocalServer]:
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
def test_a_length_that_is_none_is_refused(
    started_server: LocalServer, length: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with connect(started_server, post(length)) as client:
        assert client.recv(1000).startswith(b"HTTP/1.0 413")
    assert capfd.readouterr().err == "" and TAKEN == []


def test_half_a_form_is_not_taken(started_server: LocalServer) -> None:
    with connect(started_server, post("20") + b"choice=a") as client:
        client.shutdown(socket.SHUT_WR)
        assert client.recv(1000).startswith(b"HTTP/1.0 400")
    assert TAKEN == []


def test_a_client_that_hangs_up_leaves_no_traceback(
    started_server: LocalServer, capfd: pytest.CaptureFixture[str]
) -> None:
    client = connect(started_server, b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
    assert client.recv(10)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # resets the connection
    client.close()
    wait_until_free(started_server)
    assert capfd.readouterr().err == ""


def wait_until_free(server: LocalServer) -> None:
    for _ in range(MOST_CONNECTIONS):
        server.free_connections.acquire()
    for _ in range(MOST_CONNECTIONS):
        server.free_connections.release()


def test_half_requests_take_a_limited_number_of_threads_for_a_limited_time(
    started_server: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Handler.timeout == local_server.SECONDS
    monkeypatch.setattr(Handler, "timeout", 1.0)
    before = threading.active_count()
    clients = [connect(started_server, b"GET / HT") for _ in range(MOST_CONNECTIONS + 20)]
    assert threading.active_count() <= before + MOST_CONNECTIONS
    wait_until_free(started_server)
    with connect(started_server, b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n") as client:
        assert client.recv(12) == b"HTTP/1.0 200"
    for client in clients:
        client.close()


@pytest.mark.parametrize("start", [b"GET / HTTP/1.0\r\nX: ", post("4096")])
def test_a_client_that_sends_a_byte_now_and_then_is_hung_up_on(
    started_server: LocalServer, monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    monkeypatch.setattr(Handler, "timeout", 0.5)
    with connect(started_server, start) as client:
        client.settimeout(0.02)
        for _ in range(200):  # four seconds, with a byte every 20 ms
            try:
                client.sendall(b"a")
                assert client.recv(1000) == b""
                break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            pytest.fail("the server still listens")
    wait_until_free(started_server)
    assert TAKEN == []
