"""The extension is built once, and where it cannot be, one line says why."""

import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.simulated_gpu import build


def test_a_build_of_torch_for_gpus_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert build.obstacle() == f"torch {torch.__version__} is a build for GPUs"


def test_a_machine_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    assert build.obstacle() == "there is no C++ compiler (no-such-compiler)"


def test_an_old_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.8.1+cpu")
    assert build.obstacle() == "torch 2.8.1+cpu is older than 2.9"


def test_those_that_build_at_once_build_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
    assert len(built) == 2  # of another torch


def test_a_failed_build_shows_the_compilers_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "build.py"
    broken.write_text("import sys\nsys.exit('error: no such header')\n")
    monkeypatch.setattr(build.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="building the simulated GPU failed"):
        build.build_apart(tmp_path / "folder")
