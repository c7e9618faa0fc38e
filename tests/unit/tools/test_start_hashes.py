"""The packages of requirements.lock are installed only as they were locked: with the real pip, from a local folder."""

import hashlib
import os
import sys
import zipfile
from pathlib import Path

import pytest

from tools import start
from tools.start import Source, StartError

LOCK = """\
small-tool==1.0 \\
    --hash=sha256:{digest}
    # via -r requirements.txt
torch==2.15.0 \\
    --hash=sha256:{digest}
    # via -r requirements.txt
"""


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the wheel that the lock names, in place of the package index; pip installs into `installed`."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "installed"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setattr(start, "chooses_packages", lambda python: False)  # no settings of the user's
    monkeypatch.setattr(start, "install_torch", lambda venv, python, tag: None)
    monkeypatch.setattr(start, "ROOT", tmp_path)
    monkeypatch.setattr(start.shutil, "which", lambda name: None)  # pip also where uv is installed
    digest = hashlib.sha256(write_wheel(folder, "print('locked')").read_bytes()).hexdigest()
    (tmp_path / start.TESTED).write_text(LOCK.format(digest=digest))
    return folder


def write_wheel(folder: Path, code: str) -> Path:
    path, info = folder / "small_tool-1.0-py3-none-any.whl", "small_tool-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("small_tool.py", code)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-tool\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"small_tool.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def install(folder: Path) -> tuple[str, ...]:
    return start.install_all(folder, Path(sys.executable), start.RUN_REQUIREMENTS, Source())


def test_the_wheel_that_was_locked_is_installed(wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    assert install(tmp_path / "venv") == start.RUN_REQUIREMENTS
    assert (tmp_path / "installed" / "small_tool.py").read_text() == "print('locked')"


def test_a_wheel_that_was_replaced_is_not_installed(wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    write_wheel(wheels, "print('replaced')")
    with pytest.raises(StartError, match=r"(?s)installing the packages failed.*DO NOT MATCH THE HASHES"):
        install(tmp_path / "venv")
    assert not (tmp_path / "installed").exists()


def test_a_package_without_a_hash_is_not_installed(wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    text = (tmp_path / start.TESTED).read_text()
    line = next(line for line in text.splitlines() if "--hash" in line)
    (tmp_path / start.TESTED).write_text(text.replace(f" \\\n{line}", "", 1))
    with pytest.raises(StartError, match=r"(?s)installing the packages failed.*[Hh]ash"):
        install(tmp_path / "venv")
    assert not (tmp_path / "installed").exists()
