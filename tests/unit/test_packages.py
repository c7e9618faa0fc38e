"""What is said of an error that a missing or broken package led to, and of others."""

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from library.environment.packages import describe_fault
from library.environment.requirements import show_uncaught
from tests.running import ROOT


def error_of(action: Callable[[], Any]) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An installed package that imports another one, which raises, and hides the error as transformers does."""
    for name, code in {
        "outer_package": "try:\n    import inner_package\nexcept Exception as e:\n    raise RuntimeError() from e",
        "inner_package": "def check():\n    raise OSError('libx.so: wrong ELF class')\ncheck()",
    }.items():
        (tmp_path / f"{name}.py").write_text(code)
        (tmp_path / f"{name}-2.0.dist-info").mkdir()
        (tmp_path / f"{name}-2.0.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 2.0\n")
        (tmp_path / f"{name}-2.0.dist-info" / "top_level.txt").write_text(name)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "outer_package"


def test_the_package_whose_code_failed_is_named_and_not_those_that_import_it(broken: str) -> None:
    assert describe_fault(error_of(lambda: importlib.import_module(broken))) == (
        "inner-package 2.0 cannot be imported (OSError: libx.so: wrong ELF class); install another version: "
        "pip install --upgrade inner-package"
    )


def test_a_package_that_is_missing_below_others_is_named() -> None:
    def fail() -> None:
        try:
            importlib.import_module("a_package_nobody_has.models")
        except ImportError as error:
            raise RuntimeError("Failed to import transformers.models.x") from error

    said = "this needs the package a-package-nobody-has, which is not installed: pip install a-package-nobody-has"
    assert describe_fault(error_of(fail)) == said


@pytest.mark.parametrize(
    "error", [ValueError("x"), ImportError("cannot import name 'x'"), ModuleNotFoundError("x", name="library.x")]
)
def test_other_errors_are_no_fault_of_a_package(error: Exception) -> None:
    def fail() -> None:
        raise error

    assert describe_fault(error_of(fail)) is None


def test_uncaught_errors_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(lambda: int("\x1b[31mred\u202e"))
    show_uncaught("", type(error), error, error.__traceback__)
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "\\x1b[31mred\\u202e" in printed and "\x1b" not in printed


def test_an_uncaught_error_of_a_broken_package_is_one_line(broken: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = error_of(lambda: importlib.import_module(broken))
    show_uncaught("", type(error), error, error.__traceback__)
    assert capsys.readouterr().err.startswith("error: inner-package 2.0 cannot be imported (OSError: libx.so")


def test_an_error_of_a_command_shows_the_names_of_its_arguments_escaped(tmp_path: Path) -> None:
    """Run a script of the suite that fails, since what is uncaught ends a process."""
    script = ROOT / "tools" / "show_metadata.py"
    code = f"""
import runpy, sys
sys.argv = ["show_metadata.py", "\\x1b[31m"]
sys.modules["__main__"].__file__ = {str(script)!r}
sys.path.insert(0, {str(ROOT)!r})
import library
raise RuntimeError(sys.argv[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "RuntimeError: \\x1b[31m" in done.stderr and "\x1b" not in done.stderr
