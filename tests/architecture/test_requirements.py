"""A clean installation has what the code imports, and nothing that it does not use."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"library", "networks", "tools", "finetune", "tests", "benchmarks", *(path.stem for path in ROOT.glob("*.py"))}
MODULE_OF = {
    "charset-normalizer": "charset_normalizer",
    "huggingface-hub": "huggingface_hub",
    "lion-pytorch": "lion_pytorch",
    "lycoris-lora": "lycoris",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "pre-commit": "pre_commit",
}
NAMED_WHEN_MISSING = {
    "dadaptation", "fsspec", "lion_pytorch", "prodigyopt", "pyarrow", "pynvml", "schedulefree", "wandb", "xformers",
}  # fmt: skip
COMMANDS = {"ipykernel", "mypy", "pre_commit", "pytest-xdist", "ruff"}  # used by a name that is not imported
FOR_PIP = {"aiobotocore"}  # named so that pip settles on versions sooner


def modules_required(file_name: str) -> set[str]:
    """The modules that a requirements file brings, those of files that it includes not counted."""
    lines = (ROOT / file_name).read_text(encoding="utf-8").splitlines()
    names = [re.split(r"[<>=!;\[ ]", line)[0].lower() for line in lines if line and not line.startswith(("-", "#"))]
    return {MODULE_OF.get(name.replace("_", "-"), name) for name in names}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported_by(path: Path) -> set[str]:
    """The top-level modules that a file imports, the standard library's and ours left out."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names - OURS - set(sys.stdlib_module_names)


PROGRAM = [*sources("library", "networks", "tools", "finetune"), *sorted(ROOT.glob("*.py"))]
TESTS = sources("tests", "benchmarks")


@pytest.mark.parametrize("path", [*PROGRAM, *TESTS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imported_packages_are_required(path: Path) -> None:
    allowed = modules_required("requirements.txt") | NAMED_WHEN_MISSING | {"tomllib"}  # 3.10 has no tomllib
    if path in TESTS:
        allowed |= modules_required("requirements-dev.txt")
    assert imported_by(path) - allowed == set()


@pytest.mark.parametrize(("file_name", "users"), [("requirements.txt", PROGRAM), ("requirements-dev.txt", TESTS)])
def test_required_packages_are_used(file_name: str, users: list[Path]) -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in [*users, *PROGRAM] if path != Path(__file__))
    unused = {module for module in modules_required(file_name) if not re.search(rf"\b{module}\b", text)}
    assert unused - COMMANDS - FOR_PIP == set()
