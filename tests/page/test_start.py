"""The starts of the page: by a double-click, by command, and a second time."""

import asyncio
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from library.base.errors import UserError
from library.environment.requirements import NEWEST_PYTHON, OLDEST_PYTHON
from library.page import browser, jobs
from library.page.jobs import Trainings, list_gpu_programs
from library.page.live import Live, read_code_version
from library.page.server import serve
from library.page.store import Store
from tests.page.serving import serving
from tests.running import ROOT
from tools import start

SUPPORTED = [f"3.{minor}" for minor in range(OLDEST_PYTHON[1], NEWEST_PYTHON[1] + 1)]
on_posix = pytest.mark.skipif(os.name != "posix", reason="starts a script of Unix")


def write_program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def run_start(name: str, path: Path) -> "subprocess.CompletedProcess[str]":
    environment = {"PATH": str(path), "HOME": str(path)}
    return subprocess.run(
        [str(ROOT / name)], env=environment, cwd="/", capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


@on_posix
@pytest.mark.parametrize("name", ["start.sh", "start.command"])
def test_a_double_click_starts_the_first_python_that_is_supported(name: str, tmp_path: Path) -> None:
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    done = run_start(name, tmp_path)
    assert done.returncode == 1 and "needs Python 3.10 to 3.14" in done.stderr and "python.org" in done.stderr
    write_program(tmp_path / "python3", '[ "$1" = -c ] && exit 1\necho too old')  # the check says no
    write_program(tmp_path / "python3.11", '[ "$1" = -c ] && exit 0\necho "$PWD: $*"\nexit 3')
    done = run_start(name, tmp_path)
    assert (done.returncode, done.stdout) == (3, f"{ROOT}: tools/start.py page\n")


def test_the_scripts_try_every_python_that_is_supported() -> None:
    shell, batch = (ROOT / "start.sh").read_text(), (ROOT / "start.bat").read_bytes()
    assert all(f"python{version}" in shell and version in batch.decode() for version in SUPPORTED)
    first, last = (f"({major}, {minor})" for major, minor in (OLDEST_PYTHON, NEWEST_PYTHON))
    assert f"{first} <= sys.version_info[:2] <= {last}" in shell and f"{first} <= sys.version_info" in batch.decode()
    assert batch.count(b"\n") == batch.count(b"\r\n") > 10  # cmd.exe finds no labels otherwise


def test_the_command_installs_what_the_page_needs_and_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[tuple[str, ...]] = []
    started: list[list[str]] = []
    monkeypatch.setattr(start, "ready_python", lambda venv, names: installed.append(names) or Path("python"))
    monkeypatch.setattr(start, "replace_process", lambda command: started.append(command) or 0)
    assert start.main(["page", "--port", "9000", "--no_browser"]) == 0
    assert installed == [("requirements.lock", "requirements-page.txt")]
    assert started == [["python", str(ROOT / "tools" / "page.py"), "--port", "9000", "--no_browser"]]


@pytest.mark.parametrize("package", ["starlette", "uvicorn", "jinja2"])
def test_without_its_packages_the_page_says_what_installs_them(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from tools.page import main; sys.exit(main(['--no_browser']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (f"error: the page needs the package {package}; `python3 tools/start.py page` installs it\n")


def test_a_second_start_finds_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(tmp_path) as server:
        assert serve(tmp_path, None, None, opens=False) == 0
        assert capsys.readouterr().out == f"The page is open already: {server.address.first_url}\n"
        address = tmp_path / "output" / "page" / "server.json"
        address.write_text(address.read_text().replace('"version": "', '"version": "before '))
        assert serve(tmp_path, None, None, opens=False) == 0
        assert "started before the suite was updated: end it" in capsys.readouterr().out
        with pytest.raises(UserError, match=f"--port {server.port} cannot be opened"):
            serve(tmp_path / "other", server.port, None, opens=False)


@on_posix
def test_a_browser_is_opened_where_there_is_a_screen_and_by_windows_in_wsl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without a screen Python would start a browser of text, which takes the terminal."""
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    address = "http://127.0.0.1:8189/?token=x"
    browser.show("The page is ", address, tmp_path, opens=True).join()
    assert opened == [] and not (tmp_path / browser.FIRST_PAGE).exists()
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    browser.show("The page is ", address, tmp_path, opens=False).join()
    assert opened == []
    browser.show("The page is ", address, tmp_path, opens=True).join()
    assert opened == [(tmp_path / browser.FIRST_PAGE).as_uri()]
    assert capfd.readouterr().out == f"The page is {address}\n" * 3  # a link alone at the end of its line
    monkeypatch.setattr(platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    write_program(tmp_path / "wslpath", '[ "$1" = -w ] && echo "Z:$2"')
    write_program(tmp_path / "explorer.exe", f'printf "%s" "$1" > "{tmp_path}/seen"; exit 1')
    browser.show("The page is ", address, tmp_path, opens=True).join()
    assert len(opened) == 1 and (tmp_path / "seen").read_text() == f"Z:{tmp_path / browser.FIRST_PAGE}"


def test_a_start_through_ssh_says_how_to_get_to_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.9 51000 10.0.0.5 22")
    monkeypatch.setenv("USER", "me")
    browser.show("The page is ", "http://127.0.0.1:8190/?token=x", tmp_path, opens=False)
    assert "ssh -N -L 8190:127.0.0.1:8190 me@10.0.0.5\n" in capsys.readouterr().out
    browser.show("The page is ", "http://10.0.0.5:8190/?token=x", tmp_path, opens=False)  # --listen
    assert "ssh" not in capsys.readouterr().out


def test_a_server_that_was_killed_does_not_keep_the_next_one_out(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        server.process.kill()
        server.process.wait()
        assert (tmp_path / "output" / "page" / "server.json").exists()
        with serving(tmp_path) as second:
            assert second.send("GET", "/")[0] == 200 and second.address.token != server.address.token


def test_open_pages_show_that_the_suite_was_updated(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.create()

    async def follow(version: str) -> bool:
        live = Live(store, Trainings(store), version=version)
        watching = asyncio.get_running_loop().create_task(live.watch())
        try:
            async for text in live.follow():
                if "is_updated" in text:
                    return bool(json.loads(text)["is_updated"])
        finally:
            watching.cancel()
        raise AssertionError

    assert asyncio.run(follow("an older one")) and not asyncio.run(follow(read_code_version()))


@on_posix
def test_other_programs_on_the_gpu_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list_gpu_programs(frozenset()) == []
    write_program(tmp_path / "nvidia-smi", "echo '7, /opt/ComfyUI/python, 8000 MiB'\necho '8, python, [N/A]'\necho x")
    assert list_gpu_programs(frozenset([8])) == ["python (8000 MiB)"]
    write_program(tmp_path / "nvidia-smi", "exit 9")
    assert list_gpu_programs(frozenset()) == []


def test_a_copy_that_fails_leaves_the_file_of_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter may vanish between the list and the copy; a file of its name belongs to somebody else."""
    loras, job = tmp_path / "loras", SimpleNamespace(output=str(tmp_path / "out" / "cat"))
    loras.mkdir()
    (loras / "cat.safetensors").write_text("theirs")
    monkeypatch.setattr(Trainings, "find_job", lambda self, run_id: job)
    monkeypatch.setattr(jobs, "describe", lambda job, state: {"files": ["cat.safetensors"]})
    monkeypatch.setattr(jobs, "find_adapter_folders", lambda: [loras])
    trainings = Trainings(Store(tmp_path))
    with pytest.raises(FileNotFoundError):
        trainings.copy("x", "cat.safetensors", str(loras))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cat.safetensors").write_text("ours")
    with pytest.raises(UserError, match="exists already and is kept"):
        trainings.copy("x", "cat.safetensors", str(loras))
    assert (loras / "cat.safetensors").read_text() == "theirs"
    (loras / "cat.safetensors").unlink()
    assert trainings.copy("x", "cat.safetensors", str(loras))
    assert (loras / "cat.safetensors").read_text() == "ours"
