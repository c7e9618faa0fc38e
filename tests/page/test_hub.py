"""Downloads of base models, from a stand-in for the hub on this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

import pytest

from library.page.hub import list_published
from library.page.tasks import START
from tests.running import ROOT

pytestmark = pytest.mark.slow
COMMIT, ETAG = "a" * 40, "b" * 64
CONTENT = bytes(range(256)) * 100_000  # the client writes parts of 10 MB


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for a public repository, me/one, whose download it cuts once, and a gated one."""

    ranges: ClassVar[list[str | None]] = []

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(length or len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self) -> None:
        is_gated, path = "/me/gated" in self.path, self.path.partition("?")[0]
        files = [{"rfilename": "model.safetensors"}]
        if "/resolve/" in path and is_gated:
            self.answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
        elif "/resolve/" in path:
            self.send_file()
        elif "/tree/" in path:
            tree = [{"type": "file", "path": "model.safetensors", "size": len(CONTENT), "oid": COMMIT}]
            self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        else:
            name = "me/gated" if is_gated else "me/one"
            values = {"id": name, "sha": COMMIT, "siblings": files, "gated": "auto" if is_gated else False}
            self.answer(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    do_HEAD = do_GET

    def send_file(self) -> None:
        own = {"X-Repo-Commit": COMMIT, "ETag": f'"{ETAG}"', "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            self.answer(200, b"", own, len(CONTENT))
            return
        wanted = self.headers.get("Range")
        self.ranges.append(wanted)
        if len(self.ranges) == 1:
            self.answer(200, CONTENT[: len(CONTENT) // 2], own, len(CONTENT))
            self.close_connection = True
            return
        begin = int((wanted or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        place = f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}"
        self.answer(206 if wanted else 200, CONTENT[begin:], {**own, "Content-Range": place} if wanted else own)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Hub, "ranges", [])
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def run_task(task: str, inputs: dict[str, Any], address: str, folder: Path) -> list[dict[str, Any]]:
    """Return the answers of a task of the page's worker that reaches the stand-in alone."""
    own = {"HF_ENDPOINT": address, "HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", START, str(ROOT), task], input=json.dumps(inputs) + "\n", cwd=folder,
        env={**environment, **own}, capture_output=True, text=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_download_that_is_cut_goes_on_where_it_ended(hub: str, tmp_path: Path) -> None:
    wanted = {"repository": "me/one", "file": "model.safetensors"}
    answers = run_task("download", wanted, hub, tmp_path)
    if "error" in answers[-1]:  # the client has not gone on by itself
        answers = run_task("download", wanted, hub, tmp_path)
    assert Path(answers[-1]["result"]["base"]).read_bytes() == CONTENT
    assert Hub.ranges[0] is None and 0 < int(str(Hub.ranges[-1]).strip("bytes=-")) <= len(CONTENT) // 2
    assert answers[-2] == {"done": len(CONTENT), "total": len(CONTENT)}


def test_a_repository_that_asks_for_a_login_names_the_command(hub: str, tmp_path: Path) -> None:
    (answer,) = run_task("download", {"repository": "me/gated", "file": "model.safetensors"}, hub, tmp_path)
    assert "hf auth login" in answer["error"]["message"] and answer["error"]["setting"] == "--base"
    answers = run_task("logins", {"repositories": ["me/gated", "me/one"]}, hub, tmp_path)
    assert answers[-1]["result"] == {"logins": {"me/gated": True, "me/one": False}}


def test_without_a_connection_a_download_fails_with_its_reason(tmp_path: Path) -> None:
    (answer,) = run_task("download", {"repository": "me/one", "file": "x.safetensors"}, "http://127.0.0.1:9", tmp_path)
    assert "--base me/one cannot be downloaded" in answer["error"]["message"]
    answers = run_task("logins", {"repositories": ["me/one"]}, "http://127.0.0.1:9", tmp_path)
    assert answers[-1]["result"] == {"logins": {}}


def test_the_offered_models_are_those_that_the_scripts_name() -> None:
    offered = {(one["repository"], one["file"]): one for one in list_published()}
    sdxl = offered["stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors"]
    assert sdxl["gigabytes"] == 6.9 and "RAIL" in sdxl["licence"]
