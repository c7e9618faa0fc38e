"""The requirements list exactly the packages that the code imports, and a checkout can be installed."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from library.base.version import VERSION
from library.environment.module_names import module_of
from library.environment.requirements import python_path
from tests.architecture.sources import ROOT, python_files, scripts, source_of, text_of
from tests.hiding import OPTIONAL

OURS = {"library", "networks", "tools", "finetune", "tests", "benchmarks", *(path.stem for path in ROOT.glob("*.py"))}
IMPORTED_AS = {"lycoris-lora": "lycoris"}  # of requirements-dev.txt
NAMED_WHEN_MISSING = {*OPTIONAL, "fsspec"}  # which comes with torch and huggingface_hub
COMMANDS = {"ipykernel", "mypy", "pre_commit", "pytest_timeout", "pytest_xdist", "ruff"}  # not imported
FOR_PIP = {"aiobotocore"}  # listed so that pip resolves versions faster


def modules_required(file_name: str) -> set[str]:
    """Return the modules that a requirements file installs, without those of included files."""
    lines = (ROOT / file_name).read_text(encoding="utf-8").splitlines()
    names = [re.split(r"[<>=!;\[ ]", line)[0] for line in lines if line and not line.startswith(("-", "#"))]
    return {IMPORTED_AS.get(name, module_of(name)) for name in names}


def imported_by(path: Path) -> set[str]:
    """Return the top-level modules that a file imports, except the standard library's and ours."""
    return {module.split(".")[0] for module, _ in source_of(path).imports} - OURS - set(sys.stdlib_module_names)


PROGRAM = [*python_files("library", "networks", "tools", "finetune"), *scripts()]
TESTS = python_files("tests", "benchmarks")


def test_imported_packages_are_required() -> None:
    allowed = modules_required("requirements.txt") | NAMED_WHEN_MISSING | {"tomllib"}  # Python 3.10 has no tomllib
    in_page = allowed | modules_required("requirements-page.txt")
    in_tests = in_page | modules_required("requirements-dev.txt")
    unlisted = {
        path.as_posix(): imported_by(path)
        - (in_tests if path in TESTS else in_page if path.is_relative_to("library/page") else allowed)
        for path in PROGRAM + TESTS
    }
    assert {path: missing for path, missing in unlisted.items() if missing} == {}


@pytest.mark.parametrize(
    ("file_name", "users"),
    [("requirements.txt", PROGRAM), ("requirements-dev.txt", TESTS), ("requirements-page.txt", PROGRAM)],
)
def test_required_packages_are_used(file_name: str, users: list[Path]) -> None:
    text = "\n".join(text_of(path) for path in [*users, *PROGRAM] if (ROOT / path) != Path(__file__))
    unused = {module for module in modules_required(file_name) if not re.search(rf"\b{module}\b", text)}
    assert unused - COMMANDS - FOR_PIP == set()


# `pip install` of a checkout, as front ends do with their `sd-scripts` folder.

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
