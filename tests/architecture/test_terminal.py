"""Everything that commands print goes through library/base/terminal.py, which escapes what steers a terminal."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture.sources import python_files, scripts, text_of

PROGRAM = [*python_files("library", "networks", "tools", "finetune"), *scripts()]
FUNCTIONS = ("print", "input")
PARSERS = ("library/base/command_parser.py", "library/training/command_line/")  # which escape what they refuse
METHODS = ("stdout.write", "stderr.write", "stdout.writelines", "stderr.writelines", "tqdm.write")
HANDLERS = ("StreamHandler", "RichHandler")  # of log lines; a module that makes one escapes their texts


def find_prints(text: str) -> Iterator[str]:
    """Yield the calls of a source that reach the terminal by themselves."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FUNCTIONS or name.endswith(METHODS):
                yield f"line {node.lineno}: {name}"
            elif name.rpartition(".")[2] in HANDLERS and "addFilter(EscapedTexts())" not in text:
                yield f"line {node.lineno}: {name} without EscapedTexts"


@pytest.mark.parametrize(
    "line",
    [
        "print(path)",
        "input(f'{name}?')",
        "sys.stdout.write(name)",
        "sys.__stderr__.flush(); sys.stderr.write(x)",
        "tqdm.write(name)",
        "logging.StreamHandler(sys.stderr)",
    ],
)
def test_a_print_of_its_own_is_found(line: str) -> None:
    assert list(find_prints(line))


def test_every_text_goes_through_the_function_that_escapes_it() -> None:
    found = {path: list(find_prints(text_of(path))) for path in PROGRAM if path != Path("library/base/terminal.py")}
    assert {path: calls for path, calls in found.items() if calls} == {}


def test_every_command_has_a_parser_that_escapes_what_it_refuses() -> None:
    """A parser without a help reads words for another one."""
    others = [path for path in PROGRAM if not path.as_posix().startswith(PARSERS)]
    assert [p for p in others if re.search(r"ArgumentParser\((?!add_help=False)", text_of(p))] == []
