"""CONTRIBUTING.md sends readers to files and names that exist."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("## Where things are")[2]
PATH = r"(?<![\w./-])(?:library|networks|tests|docs|tools|benchmarks|\.ci)/[\w./-]*[\w/]"
NAMED = sorted(set(re.findall(PATH, PAGE)))
MODULES = sorted(set(re.findall(r"(?<!\w)(?:tests|benchmarks)(?:\.[a-z_]+)+", PAGE)))  # of commands
SYMBOLS = sorted(set(re.findall(r"`([\w/]+\.py)` \(`(\w+)`\)", TABLE)))


def test_the_table_names_files_and_symbols() -> None:
    assert len(NAMED) > 40 and len(SYMBOLS) > 10
    assert len(SYMBOLS) == len(set(re.findall(r"`\S+` \(`.*?\)", TABLE))), "write `path.py` (`name`)"


@pytest.mark.parametrize("path", NAMED)
def test_named_files_exist(path: str) -> None:
    place = ROOT / path
    assert any(place.iterdir()) if path.endswith("/") else place.stat().st_size > 0


def test_named_modules_exist() -> None:
    assert len(MODULES) > 3 and [name for name in MODULES if find_spec(name) is None] == []


@pytest.mark.parametrize(("path", "symbol"), SYMBOLS)
def test_named_symbols_are_defined_there(path: str, symbol: str) -> None:
    """A path without folders is a module of every base model."""
    files = [ROOT / path] if "/" in path else [*(ROOT / "library" / "architectures").glob(f"*/{path}")]
    defined = {name for file in files for name in definitions(ast.parse(file.read_text(encoding="utf-8")))}
    assert symbol in defined


def definitions(tree: ast.Module) -> set[str]:
    """Return the names of functions, classes, constants and fields."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(name)):
                names.add(name)
            case ast.Assign(targets=[ast.Name(name)]):
                names.add(name)
    return names
