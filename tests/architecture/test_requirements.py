"""The requirements list exactly the packages that the code imports."""

import re
import sys
from pathlib import Path

import pytest

from library.environment.module_names import module_of
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
