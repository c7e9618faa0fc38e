"""Every import of ours names something that is there, also inside functions that no test calls, such as benchmarks."""

from pathlib import Path

from tests.architecture.sources import ROOT, python_files, scripts, source_of

OURS = ("library", "networks", "tools", "finetune", "tests", "benchmarks")
MADE_UP = ("library.architectures.knots", "tests.made_up.knots")  # where a test puts a package, and where it lies


def file_of(module: str) -> Path | None:
    """Return the source of a module of ours."""
    path = Path(*module.replace(*MADE_UP).split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if (ROOT / p).is_file()), None)


def missing_in(path: Path) -> list[str]:
    """Return what a file imports from modules of ours and they do not have."""
    found = []
    for module, names in source_of(path).imports:
        if module.split(".")[0] in OURS:
            source = file_of(module)
            there = source_of(source).defined if source is not None else frozenset()
            found += [f"{module}.{name}" for name in names if name not in there and not file_of(f"{module}.{name}")]
    return found


def test_imports_of_ours_resolve() -> None:
    found = {path.as_posix(): missing_in(path) for path in (*python_files(*OURS), *scripts())}
    assert {path: missing for path, missing in found.items() if missing} == {}
