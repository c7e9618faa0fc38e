"""The extension is built once, or one line says why it cannot be built."""

import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.simulated_gpu import build, plugin


def test_a_gpu_build_of_torch_is_not_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert build.obstacle() == f"torch {torch.__version__} is a build for GPUs"


def test_a_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert build.obstacle() == "there is no C++ compiler (no-such-compiler)"


def test_missing_python_headers_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    assert str(build.obstacle()).startswith("there are no headers of Python")


def test_tests_are_skipped_with_one_line_if_the_extension_cannot_be_built(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(plugin, "obstacle", lambda: "there is no C++ compiler (c++)")
    assert plugin.pytest_cmdline_main(request.config) == pytest.ExitCode.OK
    assert capsys.readouterr().out == "simulated GPU: its tests are skipped, as there is no C++ compiler (c++)\n"
    monkeypatch.setattr(plugin, "obstacle", lambda: None)
    assert plugin.pytest_cmdline_main(request.config) is None


def test_an_old_torch_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.8.1+cpu")
    assert build.obstacle() == "torch 2.8.1+cpu is older than 2.9"


def test_concurrent_builds_compile_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built: list[Path] = []

    def slowly(folder: Path) -> None:
        built.append(folder)
        folder.mkdir()
        time.sleep(0.2)
        (folder / "simulated_gpu.so").write_bytes(b"built")

    loaded: list[bytes] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "build_apart", slowly)
    monkeypatch.setattr(build, "load", lambda file: loaded.append(file.read_bytes()) or ModuleType("built"))
    threads = [threading.Thread(target=build.extension) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == [b"built"] * 3 and len(built) == 1
    monkeypatch.setattr(torch, "__version__", "9.9")
    build.extension()
    assert len(built) == 2  # the second for another torch


def test_a_failed_build_shows_the_compiler_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'a.cpp:1:1: error: no such header' >&2\necho 'many other lines'\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(build.sys, "executable", str(python))
    with pytest.raises(RuntimeError, match=r"failed:\na.cpp:1:1: error: no such header$"):
        build.build_apart(tmp_path / "folder")
