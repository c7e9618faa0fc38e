"""Every import of ours names something that is there, also inside functions that no test calls, such as benchmarks."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("library", "networks", "tools", "finetune", "tests", "benchmarks")
FILES = [path for top in OURS for path in sorted((ROOT / top).rglob("*.py"))] + sorted(ROOT.glob("*.py"))
MADE_UP = ("library.architectures.knots", "tests.made_up.knots")  # where a test puts a package, and where it lies


def file_of(module: str) -> Path | None:
    """The source of a module of ours."""
    path = ROOT.joinpath(*module.replace(*MADE_UP).split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@cache
def names_in(path: Path) -> frozenset[str]:
    """Return the names that a module defines or imports, at any depth of its conditions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return frozenset(found)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_of_ours_resolve(path: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] not in OURS:
            continue
        assert node.module is not None
        source = file_of(node.module)
        for alias in node.names:
            is_module = file_of(f"{node.module}.{alias.name}") is not None
            if not is_module and (source is None or alias.name not in names_in(source)):
                missing.append(f"{node.module}.{alias.name}")
    assert missing == []
