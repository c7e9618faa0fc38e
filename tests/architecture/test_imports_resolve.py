"""Every import of our modules resolves, also inside functions that no test calls, such as in benchmarks."""

from pathlib import Path

from tests.architecture.sources import ROOT, python_files, scripts, source_of

OURS = ("library", "networks", "tools", "finetune", "tests", "benchmarks")
MADE_UP = ("library.architectures.knots", "tests.made_up.knots")  # where a test copies a package to, and its source


def file_of(module: str) -> Path | None:
    """Return the source of one of our modules."""
    path = Path(*module.replace(*MADE_UP).split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if (ROOT / p).is_file()), None)


def missing_in(path: Path) -> list[str]:
    """Return the names that a file imports from our modules and that do not exist."""
    missing = []
    for module, names in source_of(path).imports:
        if module.split(".")[0] in OURS:
            source = file_of(module)
            there = source_of(source).defined if source is not None else frozenset()
            missing += [f"{module}.{name}" for name in names if name not in there and not file_of(f"{module}.{name}")]
    return missing


def test_imports_of_our_modules_resolve() -> None:
    unresolved = {path.as_posix(): missing_in(path) for path in (*python_files(*OURS), *scripts())}
    assert {path: missing for path, missing in unresolved.items() if missing} == {}
