"""The project's sources, each parsed once per process for all tests of this folder."""

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]


def python_files(*folders: str) -> list[Path]:
    """Return the sources in these folders of the repository, relative to it."""
    return [path.relative_to(ROOT) for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def scripts() -> list[Path]:
    """Return the Python files in the repository's root folder and under musubi-tuner's paths."""
    return [
        path.relative_to(ROOT)
        for folder in (ROOT, ROOT / "src" / "musubi_tuner")
        for path in sorted(folder.glob("*.py"))
    ]


@cache
def text_of(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Source:
    """The imports and names of a file; its syntax tree would take a hundred times as much memory."""

    imports: tuple[tuple[str, Sequence[str]], ...]  # (module, names taken from it; none for a plain import)
    defined: frozenset[str]  # names defined or imported, at any depth
    identifiers: frozenset[str]  # names defined or used, including attributes and arguments
    functions: tuple[tuple[str, int, str], ...]  # (name, branches, type that it returns), nested ones included


@cache
def source_of(path: Path) -> Source:
    """Parse a file. Raises AssertionError for a relative import."""
    imports: list[tuple[str, Sequence[str]]] = []
    functions: list[tuple[str, int, str]] = []
    defined, used = set(), set()
    for node in ast.walk(ast.parse(text_of(path))):
        match node:
            case ast.Import():
                imports += [(alias.name, ()) for alias in node.names]
            case ast.ImportFrom():
                assert node.level == 0 and node.module, f"{path}: write the full path instead of a relative import"
                imports.append((node.module, [alias.name for alias in node.names]))
            case ast.alias():
                defined.add((node.asname or node.name).split(".")[0])
                used.add(node.asname or node.name)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                defined.add(node.name)
                if not isinstance(node, ast.ClassDef):
                    returned = "" if node.returns is None else ast.unparse(node.returns)
                    functions.append((node.name, sum(map(num_branches, ast.walk(node))), returned))
            case ast.Name():
                (defined if isinstance(node.ctx, ast.Store) else used).add(node.id)
            case ast.Attribute():
                used.add(node.attr)
            case ast.arg():
                used.add(node.arg)
    return Source(tuple(imports), frozenset(defined), frozenset(defined | used), tuple(functions))


def num_branches(node: ast.AST) -> int:
    """Return how many branches a node itself adds: 1 for each if, loop, except, `and`, `or`, conditional expression,
    and for each `for` and `if` of a comprehension."""
    match node:
        case ast.BoolOp():
            return len(node.values) - 1
        case ast.comprehension():
            return 1 + len(node.ifs)
        case ast.If() | ast.For() | ast.AsyncFor() | ast.While() | ast.ExceptHandler() | ast.IfExp():
            return 1
    return 0
