"""The Python versions and packages that this suite runs with, and the sentence for a Python that lacks them."""

# An old Python must be able to parse this file in order to reject itself, so the syntax is that of Python 3.6 and
# annotations are quoted.

import os
import re
import shutil
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from traceback import format_exception

from library.base.command_parser import make_parser
from library.base.terminal import print_line
from library.environment.module_names import module_of

ROOT = Path(__file__).resolve().parents[2]
OLDEST_PYTHON = (3, 10)
NEWEST_PYTHON = (3, 14)
NAMED_WHEN_USED = ("bitsandbytes", "pillow-heif", "tensorboard")  # what uses them says what to install
LISTED = 3


# --- Python ---


def python_problem(version: "tuple[int, int]") -> "str | None":
    """Return why this Python version is not supported; None if it is."""
    if OLDEST_PYTHON <= version <= NEWEST_PYTHON:
        return None
    age = "too old" if version < OLDEST_PYTHON else "too new"
    oldest, newest = (".".join(map(str, v)) for v in (OLDEST_PYTHON, NEWEST_PYTHON))
    return f"Python {version[0]}.{version[1]} is {age}: this suite runs on Python {oldest} to {newest}"


def suggest_python() -> str:
    """Return what to do with an unsupported Python: use the newest supported one on the PATH, or install one."""
    for minor in range(NEWEST_PYTHON[1], OLDEST_PYTHON[1] - 1, -1):
        if shutil.which(f"python3.{minor}"):
            return f"run the same command with `python3.{minor}`"
    return "install one of these from https://www.python.org"


def python_path(venv: Path) -> Path:
    """Return the path of a virtual environment's interpreter, whether it exists or not."""
    return venv / "Scripts" / "python.exe" if os.name == "nt" else venv / "bin" / "python"


# --- packages ---


def package_of(line: str) -> "str | None":
    """Return the package of a line of a requirements file; None for comments, options and other versions of Python."""
    below = re.search(r'python_version < "(\d+)\.(\d+)"', line)
    name = re.match(r"\w[\w.-]*", line)
    return name.group() if name and not (below and sys.version_info >= tuple(map(int, below.groups()))) else None


def list_missing() -> "list[str]":
    """Return the packages that every run needs and this Python lacks. Imports none of them."""
    requirements = ROOT / "requirements.txt"
    if not requirements.is_file():  # a wheel has none
        return []
    packages = filter(None, map(package_of, requirements.read_text(encoding="utf-8").splitlines()))
    modules = {name: module_of(name) for name in packages if name not in NAMED_WHEN_USED}
    return [name for name, module in modules.items() if module not in sys.modules and find_spec(module) is None]


def describe_missing(missing: "list[str]") -> str:
    """Return the sentence for missing packages, with the command to run."""
    listed = ", ".join(missing[:LISTED]) + (f" and {len(missing) - LISTED} more" if missing[LISTED:] else "")
    ours = python_path(ROOT / ".venv")
    lack = f"{sys.executable} lacks packages of this suite ({listed})"
    if ours.exists() and Path(sys.prefix) != ROOT / ".venv":
        return f"{lack}: run the same command with {quote(ours)}"
    pip = f"{quote(sys.executable)} -m pip install -r {quote(ROOT / 'requirements.txt')}"
    if "torch" not in missing:
        return f"{lack}: run `{pip}`"
    setup = f"run `python3 {quote(ROOT / 'tools' / 'start.py')} setup` and the same command with {quote(ours)}"
    return f"{lack}: {setup}, or install them here with `{pip}`"


def quote(path: "Path | str") -> str:
    """Quote a path with spaces for the shells of every system."""
    return f'"{path}"' if " " in str(path) else str(path)


# --- the check ---


def check_environment() -> None:
    """End a script of this suite with one sentence if this Python is too old or lacks packages.

    A script that defines NEEDS_PACKAGES = False runs without them. Other programs that import `library` get Python's
    own errors, which they may catch.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None or ROOT not in Path(script).resolve().parents:
        return
    problem = python_problem(sys.version_info[:2])
    if problem and sys.version_info[:2] < OLDEST_PYTHON:
        raise SystemExit(f"error: {problem}; {suggest_python()}")
    missing = list_missing() if getattr(sys.modules["__main__"], "NEEDS_PACKAGES", True) else []
    sentence = ""
    if missing:
        # A new Python runs the suite as soon as all packages support it.
        sentence = f"error: {problem}; {suggest_python()}" if problem else f"error: {describe_missing(missing)}"
        if sys.argv[1:] == ["--version"]:
            make_parser().parse_args()
        if not {"-h", "--help"} & set(sys.argv[1:]):
            raise SystemExit(sentence)
    sys.excepthook = partial(show_uncaught, sentence)  # the help of training scripts needs no package


def show_uncaught(sentence, kind, error, traceback):  # type: ignore[no-untyped-def]
    """Show an exception that ends a script: one line for a missing or broken package, else its traceback, escaped.

    `sentence` is that of packages which every run needs, if some are missing.
    """
    if sentence and isinstance(error, ImportError):
        return print_line(sentence, sys.stderr)
    from library.environment.packages import describe_fault  # not for an old Python

    fault = describe_fault(error.with_traceback(traceback))
    text = f"error: {fault}" if fault else "".join(format_exception(kind, error, traceback)).rstrip("\n")
    return print_line(text, sys.stderr)
