"""The commands of a package: its modules with a `main`, which takes the words after the command's name."""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

import library  # noqa: F401  # checks the packages before they are imported
from library.base.command_parser import make_parser


def list_commands(package: str) -> list[str]:
    """Return the names of a package's commands."""
    folder = Path(str(import_module(package).__file__)).parent
    return sorted(path.stem for path in folder.glob("*.py") if "\nmain = " in path.read_text(encoding="utf-8"))


def run_module(package: str, description: str, argv: Sequence[str]) -> int:
    """Run the command that the first word names with the others, and return its exit status."""
    parser = make_parser(description, prog=f"python3 -m {package}")
    parser.add_argument("name", choices=list_commands(package))
    name = parser.parse_args(argv[:1]).name
    sys.argv[0] = f"python3 -m {package} {name}"  # argparse names it in help and errors
    status: int = import_module(f"{package}.{name}").main(argv[1:])
    return status


def measurement(
    setup_parser: Callable[[], argparse.ArgumentParser], measure: Callable[[argparse.Namespace], None]
) -> Callable[[Sequence[str]], int]:
    """Return the `main` of a measurement, which unlike other commands has all installed packages and its tracebacks."""

    def main(argv: Sequence[str]) -> int:
        measure(setup_parser().parse_args(argv))
        return 0

    return main
