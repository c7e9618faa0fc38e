"""`pip install` of a checkout, as front ends do with their `sd-scripts` folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from library.base.version import VERSION
from library.environment.requirements import python_path

ROOT = Path(__file__).parents[2]
PACKAGES = ("finetune", "library", "networks", "tools")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Copy the installed packages and two other folders, since building writes next to pyproject.toml."""
    folder = tmp_path / "sd-scripts"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    for name in ("configs", "tests"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    return folder


@pytest.mark.slow
def test_an_editable_installation_can_be_imported_from_another_folder(checkout: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "fresh", with_pip=False)
    python = python_path(tmp_path / "fresh")
    with_setuptools = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    install = [*PIP, "--python", str(python), "install", *OFFLINE, "--editable", str(checkout)]
    subprocess.run(install, env=with_setuptools, cwd=tmp_path, check=True)
    code = f"import importlib\nfor name in {PACKAGES}: print(importlib.import_module(name).__file__)\n"
    code += "from importlib import metadata\nsuite = metadata.distribution('library')\n"
    code += "print(suite.version, suite.requires, list(suite.entry_points))"
    done = subprocess.run([str(python), "-I", "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True, check=True)
    files = [str(checkout / name / "__init__.py") for name in PACKAGES]
    assert done.stdout.splitlines() == [*files, f"{VERSION} None []"]  # front ends keep their packages


@pytest.mark.slow
def test_a_wheel_contains_exactly_the_files_of_the_four_packages(checkout: Path, tmp_path: Path) -> None:
    subprocess.run([*PIP, "wheel", *OFFLINE, "--wheel-dir", str(tmp_path), str(checkout)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == expected
