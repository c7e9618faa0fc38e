"""Attacks on the page's server."""

import json
import os
import select
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image

from library.base.errors import UserError
from library.page.security import Gate
from library.page.server import serve
from library.page.store import Store, find_photo
from library.page.worker import choose_photos, read_photos
from tests.page.serving import Server, serving
from tests.running import make_images

pytestmark = pytest.mark.slow
MOST = 100_000  # bytes of an upload in these tests


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("page"), upload_bytes=MOST, body_bytes=MOST, idle_s=0.5) as server:
        yield server


def begin_upload(server: Server) -> str:
    status, answer = server.post("/api/drafts", {"is_upload": True, "name": "cat"})
    assert status == 200
    return str(answer["id"])


def test_a_name_that_leads_here_by_dns_rebinding_is_refused(server: Server) -> None:
    for host in (
        f"evil.example:{server.port}",
        "evil.example",
        f"127.0.0.1.evil.example:{server.port}",
        "127.0.0.1",
        "",
    ):
        status, body, _ = server.send("GET", "/", headers={"Host": host})
        assert status == 403 and server.address.token.encode() not in body, host
    assert server.send("GET", "/", headers={"Host": f"localhost:{server.port}"})[0] == 200


def test_two_hosts_are_refused(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        own = f"127.0.0.1:{server.port}"
        connection.sendall(f"GET / HTTP/1.1\r\nHost: evil.example\r\nHost: {own}\r\n\r\n".encode())
        assert connection.makefile("rb").readline().split()[1] in (b"400", b"403")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Page-Token": "wrong"},
        {"X-Page-Token": ""},
        {"X-Page-Token": "TOKEN", "Origin": "http://evil.example"},
        {"X-Page-Token": "TOKEN", "Origin": "null"},
        {"X-Page-Token": "TOKEN", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    ],
)
def test_nothing_is_changed_without_the_token_of_this_page(server: Server, headers: dict[str, str]) -> None:
    filled = {name: value.replace("TOKEN", server.address.token) for name, value in headers.items()}
    before = set((server.folder / "output" / "page" / "drafts").iterdir())
    for path in ("/api/drafts", "/api/queue/run", "/api/bases"):
        assert server.send("POST", path, '{"is_upload": true}', filled)[0] == 403
    assert set((server.folder / "output" / "page" / "drafts").iterdir()) == before


@pytest.mark.parametrize("cookie", ["", "page_token_PORT=wrong", "page_token=TOKEN", "page_token_1=TOKEN"])
def test_another_user_of_this_machine_gets_nothing(server: Server, cookie: str) -> None:
    """Other local users reach the port too, but neither the address with the token nor the file that has it."""
    draft = begin_upload(server)
    headers = {"Cookie": cookie.replace("PORT", str(server.port)).replace("TOKEN", server.address.token)}
    paths = ["/", "/?token=", "/?token=wrong", "/static/main.js", "/api/events", "/api/bases", "/api/folders"]
    paths += [f"/api/drafts/{draft}", f"/api/drafts/{draft}/thumbnails/report", "/runs/x/report", "/runs/x/report?key="]
    for path in (*paths, f"/api/drafts?token={server.address.token}"):
        status, body, answered = server.send("GET", path, headers=headers)
        assert status == 401 and server.address.token.encode() not in body and "set-cookie" not in answered, path
    own = {name: value for name, value in server.own.items() if name != "Cookie"}
    assert server.send("POST", "/api/drafts", '{"is_upload": true}', {**own, **headers})[0] == 401


def test_the_address_of_the_start_gives_a_browser_its_cookie(server: Server) -> None:
    path = server.address.first_url.removeprefix(server.address.url.rstrip("/"))
    status, body, headers = server.send("GET", path, headers={"Cookie": ""})
    assert (status, headers["refresh"]) == (200, "0; url=/")
    assert b'rel="icon"' in body and headers["content-type"].startswith("text/html")  # no request for /favicon.ico
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= {*headers["set-cookie"].split("; ")}
    given = {"Cookie": headers["set-cookie"].partition(";")[0]}
    assert server.send("GET", "/", headers=given)[0] == 200
    assert server.send("POST", "/api/drafts", "{}", given)[0] == 403


@pytest.mark.skipif(os.name != "posix", reason="reads permissions")
def test_no_process_and_no_file_shows_the_token_to_other_users(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setenv("DISPLAY", ":0")
    assert serve(server.folder, None, None, opens=True) == 0
    assert len(opened) == 1 and server.address.token not in opened[0]
    page = Path(unquote(urlsplit(opened[0]).path))
    assert server.address.first_url in page.read_text()
    for path in (page, page.with_name("server.json")):
        assert path.stat().st_mode & 0o077 == 0


def test_other_sites_can_embed_nothing_and_read_nothing(server: Server) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    assert server.send("GET", "/static/main.js", headers=headers)[0] == 403
    _, _, answered = server.send("GET", "/", headers={"Origin": server.address.url.rstrip("/")})
    assert "frame-ancestors 'none'" in answered["content-security-policy"]
    assert answered["cross-origin-resource-policy"] == "same-origin"
    assert "access-control-allow-origin" not in answered


def test_the_token_is_in_the_page_alone(server: Server) -> None:
    assert server.address.token.encode() in server.send("GET", "/")[1]
    for path in ("/static/main.js", "/api/bases", f"/api/folders?path={server.folder}"):
        assert server.address.token.encode() not in server.send("GET", path)[1]


@pytest.mark.parametrize(
    "path",
    [
        "/static/../views.py",
        "/static/..%2fviews.py",
        "/static/%2e%2e/views.py",
        "/static/..%5cviews.py",
        "/../../etc/passwd",
        "//etc/passwd",
        "/api/drafts/..%2f..%2fserver.json",
        "/api/drafts/DRAFT/thumbnails/..%2f..%2f..%2fserver.json",
        "/api/drafts/DRAFT/thumbnails//etc/passwd",
        "/api/drafts/DRAFT/thumbnails/%00",
        "/runs/..%2f..%2fserver/report",
        "/runs/server/report",
        "/api/runs/..%2fx/log%00",
    ],
)
def test_no_path_leads_to_another_file(server: Server, path: str) -> None:
    status, body, _ = server.send("GET", path.replace("DRAFT", begin_upload(server)))
    assert status in (400, 401, 404) and server.address.token.encode() not in body and b"root:" not in body


@pytest.mark.parametrize(
    "name",
    ["..%2fa.png", "..%2f..%2fa.png", "%2e%2e%5ca.png", ".a.png", "a.exe", "a.html", "a.png%00", "C:a.png",
     "%2fetc%2fa.png", "a" * 300 + ".png", "a%0a.png"],
)  # fmt: skip
def test_no_upload_leaves_its_folder_or_is_another_kind_of_file(server: Server, name: str) -> None:
    draft = begin_upload(server)
    before = {path for path in server.folder.rglob("*") if path.is_file()}
    assert server.send("POST", f"/api/upload/{draft}/{name}", b"x", server.own)[0] in (400, 404)
    assert {path for path in server.folder.rglob("*") if path.is_file()} == before


def test_photos_are_taken_only_for_a_draft_of_uploads(server: Server, tmp_path: Path) -> None:
    _, answer = server.post("/api/drafts", {"folder": str(tmp_path)})
    assert server.send("POST", f"/api/upload/{answer['id']}/a.png", b"x", server.own)[0] == 400
    assert list(tmp_path.iterdir()) == []


def test_a_huge_upload_is_refused_before_it_is_read(server: Server) -> None:
    draft = begin_upload(server)
    path = f"/api/upload/{draft}/a.png"
    assert server.send("POST", path, b"x" * MOST, server.own)[0] == 200
    assert server.send("POST", path.replace("a.png", "b.png"), b"x" * (MOST + 1), server.own)[0] == 413
    chunks = (b"x" * 10_000 for _ in range(1000))  # of which the server does not know how many come
    try:
        status = server.send("POST", path.replace("a.png", "c.png"), chunks, server.own)[0]
    except (ConnectionError, BrokenPipeError):  # it hung up while they were sent
        status = 413
    assert status == 413
    uploads = [path.name for path in (server.folder / "output" / "page" / "uploads").rglob("*.png")]
    assert not {"b.png", "c.png"} & set(uploads)
    assert server.send("POST", "/api/drafts", b" " * (MOST + 1), server.own)[0] == 413


def test_requests_that_are_no_json_are_refused(server: Server) -> None:
    for body in (b"[1]", b"{", b"\xff\xfe", b"1" * 5000, b"[" * 5000, b'{"a": NaN}'):
        assert server.send("POST", "/api/drafts", body, server.own)[0] == 400
    assert server.send("PUT", "/api/drafts", b"{}", server.own)[0] == 405
    assert server.send("OPTIONS", "/", headers={"Origin": "http://evil.example"})[0] == 403


def test_of_two_changes_at_once_both_stay(server: Server) -> None:
    draft = begin_upload(server)
    path, slow, quick = f"/api/drafts/{draft}", json.dumps({"trigger": "zcat"}), {"prompts": "a cat"}
    own = {**server.own, "Host": f"127.0.0.1:{server.port}", "Content-Length": str(len(slow))}
    head = "".join(f"{name}: {value}\r\n" for name, value in own.items())
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n{slow[:5]}".encode())
        assert server.post(path, quick)[0] == 200
        connection.sendall(slow[5:].encode())
        assert b" 200 " in connection.makefile("rb").readline()
    known = json.loads(server.send("GET", path)[1])["draft"]
    assert (known["trigger"], known["prompts"]) == ("zcat", "a cat")


def test_values_that_the_page_has_no_field_for_are_refused(server: Server) -> None:
    path = f"/api/drafts/{begin_upload(server)}"
    for values in ({"root": "/"}, {"kind": "x"}, {"steps": True}, {"steps": -1}, {"base": 3}, {"strength": 99},
                   {"prompts": "x" * 30_000}, {"minutes": "1"}):  # fmt: skip
        assert server.post(path, values)[0] == 400, values
    assert server.post(path, {"steps": 10, "kind": "style", "prompts": None})[0] == 200
    assert server.post(f"{path}/photos", {"names": ["../../x.png"], "caption": "x"})[0] == 404


def hangs_up(connection: socket.socket) -> bool:
    """Wait until the server ends a connection whose answer nobody reads."""
    poll = select.poll()
    poll.register(connection, select.POLLERR | select.POLLHUP)
    return bool(poll.poll(60_000))


def test_a_client_that_never_ends_its_request_is_hung_up_on(server: Server) -> None:
    head = f"POST /api/drafts HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nX-Page-Token: {server.address.token}\r\n"
    head += f"Cookie: {server.cookie['Cookie']}\r\n"
    for start in (b"", b"GET / HT", head.encode()):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(start)
            with suppress(ConnectionResetError):
                assert connection.recv(1) == b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert b" 408 " in connection.makefile("rb").readline()


@pytest.mark.skipif(os.name != "posix", reason="waits with poll")
def test_a_client_that_reads_no_answer_is_hung_up_on(server: Server) -> None:
    draft = begin_upload(server)
    photos = [{"name": f"{number}.png", "caption": "x" * 200, "problems": []} for number in range(50_000)]
    found = {"folders": [{"path": "", "photos": photos, "left_out": []}], "trigger": "x"}
    Store(server.folder).write(draft, "photos.json", found)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        own = f"Host: 127.0.0.1:{server.port}\r\nCookie: {server.cookie['Cookie']}\r\n"
        connection.sendall(f"GET /api/drafts/{draft} HTTP/1.1\r\n{own}\r\n".encode())
        assert hangs_up(connection)


def test_200_connections_keep_nobody_out(tmp_path: Path) -> None:
    with serving(tmp_path) as patient:  # which hangs up on none of them meanwhile
        connections = [socket.create_connection(("127.0.0.1", patient.port)) for _ in range(200)]
        assert patient.send("GET", "/")[0] == 200
        for connection in connections:
            connection.close()


def is_followed(connection: socket.socket) -> bool:
    """Return True if the server sends its state, False if it ends the answer without."""
    lines = iter(connection.makefile("rb").readline, b"")
    return any(line.startswith(b"data: {") for line in lines)


def test_more_pages_than_the_server_follows_are_told_so(server: Server) -> None:
    path, connections = "/api/events", []
    own = f"Host: 127.0.0.1:{server.port}\r\nCookie: {server.cookie['Cookie']}\r\n"
    head = f"GET {path} HTTP/1.1\r\n{own}Connection: close\r\n\r\n".encode()
    for _ in range(60):
        connections.append(socket.create_connection(("127.0.0.1", server.port), timeout=60))
        connections[-1].sendall(head)
    followed = [is_followed(connection) for connection in connections]
    assert sum(followed) == 40 and server.send("GET", "/")[0] == 200
    for connection in connections:
        connection.close()


@pytest.mark.skipif(os.name != "posix", reason="makes links")
def test_links_out_of_the_chosen_folder_are_neither_shown_nor_trained(tmp_path: Path) -> None:
    make_images(tmp_path / "photos", 2)
    make_images(tmp_path / "private", 2)
    root = tmp_path / "photos"
    (root / "link.png").symlink_to(tmp_path / "private" / "00.png")
    (root / "below").symlink_to(tmp_path / "private")
    (root / "00.txt").unlink(missing_ok=True)
    (tmp_path / "private" / "secret.txt").write_text("a secret")
    (root / "00.txt").symlink_to(tmp_path / "private" / "secret.txt")
    found = read_photos({"root": str(root)}, lambda **values: None)
    (folder,) = found["folders"]
    assert [photo["name"] for photo in folder["photos"]] == ["00.png", "01.png"]
    assert ["link.png", "is a link that leads out of the folder"] in folder["left_out"]
    assert "a secret" not in json.dumps(found)
    everything = {"folders": [{"photos": [{"name": name} for name in ("00.png", "link.png", "../private/00.png")]}]}
    assert find_photo(everything, root, "00.png") == root / "00.png"
    assert find_photo(everything, root, "link.png") is None
    assert find_photo(everything, root, "../private/00.png") is None
    inputs: dict[str, Any] = {"root": str(root), "trigger": "cat", "photos": {"00.png": "", "link.png": ""}}
    with pytest.raises(UserError, match="lacks 1 of the chosen photos"):
        choose_photos(inputs, tmp_path)
    del inputs["photos"]["link.png"]
    folders, _, texts = choose_photos(inputs, tmp_path)
    assert [photo.path.name for photo in folders[0].photos] == ["00.png"] and "link.png" not in texts[0]


def test_a_photo_that_is_no_photo_is_answered_with_a_reason(server: Server) -> None:
    draft = begin_upload(server)
    server.send("POST", f"/api/upload/{draft}/a.png", b"<script>alert(1)</script>", server.own)
    found = {"folders": [{"path": "", "photos": [{"name": "a.png", "caption": "", "problems": []}], "left_out": []}]}
    Store(server.folder).write(draft, "photos.json", {**found, "trigger": "x"})
    status, body, headers = server.send("GET", f"/api/drafts/{draft}/thumbnails/a.png")
    assert status == 400 and headers["content-type"] == "application/json" and b"cannot be" in body


def test_thumbnails_are_made_once_and_again_for_a_changed_photo(server: Server) -> None:
    draft = begin_upload(server)
    photo = next((server.folder / "output" / "page" / "uploads").glob("*"), None)
    assert photo is not None
    _, values, _ = server.send("GET", f"/api/drafts/{draft}")
    root = Path(json.loads(values)["draft"]["root"])
    Image.new("RGB", (1000, 500), "red").save(root / "a.png")
    found = {"folders": [{"path": "", "photos": [{"name": "a.png", "caption": "", "problems": []}], "left_out": []}]}
    Store(server.folder).write(draft, "photos.json", {**found, "trigger": "x"})
    thumbnails = server.folder / "output" / "page" / "thumbnails"
    before = set(thumbnails.iterdir())
    for _ in range(2):
        status, body, _ = server.send("GET", f"/api/drafts/{draft}/thumbnails/a.png")
        assert status == 200 and body.startswith(b"\xff\xd8")
    (made,) = set(thumbnails.iterdir()) - before
    with Image.open(made) as image:
        assert image.size == (320, 160)
    Image.new("RGB", (500, 1000), "red").save(root / "a.png")
    assert server.send("GET", f"/api/drafts/{draft}/thumbnails/a.png")[1] != body
    assert len(set(thumbnails.iterdir()) - before) == 2


def test_other_machines_reach_a_listening_server_by_its_addresses_alone(tmp_path: Path) -> None:
    with serving(tmp_path, listen="127.0.0.1") as server:
        assert server.send("GET", "/", headers={"Host": f"192.168.0.2:{server.port}"})[0] == 200
        assert server.send("GET", "/", headers={"Host": f"192.168.0.2:{server.port}", "Cookie": ""})[0] == 401
        assert server.send("GET", "/", headers={"Host": f"evil.example:{server.port}"})[0] == 403


def test_a_listening_server_is_known_by_addresses_and_its_own_name() -> None:
    gate = Gate(frozenset(), 80, "x", "y")
    assert all(map(gate.knows_host, ("192.168.0.2:80", "[::1]:80", "localhost:80", f"{socket.gethostname()}:80")))
    assert not any(map(gate.knows_host, ("evil.example:80", "192.168.0.2:81", "192.168.0.2", "", ":80")))
