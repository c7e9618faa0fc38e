"""Every `--word` in an error or a warning is an option: of the base model's own script below library/architectures, of
the tool below tools/, else of some script or tool."""

import ast
import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from library.architectures.scripts import script_of
from library.options.leco import LecoOptions
from library.options.output.prompts import LINE_OPTIONS
from tests.architecture.sources import python_files, text_of
from tests.running import ROOT
from tools.capabilities import CACHING, list_tools

WORD = re.compile(r"(?<![\w-])--([a-z]\w*)")


DECLARED = re.compile(r'"--([a-z]\w*)"')
TOOLS_OF = {"environment": "tools/start.py", "run_queue": "tools/run_queue.py"}
OF_OTHERS = {  # with the command that stands beside it
    "shm": "docker run", "cpu": "accelerate launch", "multi_gpu": "accelerate launch",
    "num_processes": "accelerate launch", "upgrade": "pip install",
}  # fmt: skip


def parser_names(module: str) -> set[str]:
    parser = importlib.import_module(module).setup_parser()
    names = {flag for action in parser._actions for flag in action.option_strings}
    return {name.removeprefix("--") for name in names}


@cache
def options_of_all() -> set[str]:
    """Return the options of every script and tool, and of prompt lines."""
    scripts = {path.stem for path in ROOT.glob("*train_*.py")}
    caching = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in ROOT.glob(CACHING)}
    tools = {f"tools.{path.stem}" for path in list_tools()}
    modules = scripts | caching | tools | {"train"}
    return {*LINE_OPTIONS, *LecoOptions.defaults()}.union(*map(parser_names, modules))


def texts_of_messages(source: str) -> Iterator[str]:
    """Yield the text of every raise and every warning or error that is logged, without what is filled in."""
    for node in ast.walk(ast.parse(source)):
        is_log = isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("warning", "error")
        if isinstance(node, ast.Raise) or is_log:
            parts = [part for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            yield " ".join(str(part.value) for part in parts)


def known_to(path: Path) -> set[str]:
    """Return the options that messages of a source may name."""
    package = path.parts[2] if path.parts[:2] == ("library", "architectures") else ""
    if (ROOT / "library" / "architectures" / package / "options.py").is_file():
        return {*script_of(package).options.defaults(), *LINE_OPTIONS}
    # Tools with commands, or several spellings of theirs, have more than one parser.
    tool = next((Path(tool) for folder, tool in TOOLS_OF.items() if folder in path.parts), path)
    own = DECLARED.findall(text_of(tool)) if tool.parts[0] == "tools" else ()
    return {*options_of_all(), *own}


def find_unknown(source: str, known: set[str]) -> tuple[list[str], int]:
    """Return the words of a source's messages that are no option, and how many words there are."""
    found = [(word, text) for text in texts_of_messages(source) for word in WORD.findall(text)]
    unknown = [
        word
        for word, text in found
        if word not in known
        and not (word in OF_OTHERS and OF_OTHERS[word] in text)
        and not (word.endswith("_") and any(name.startswith(word) for name in known))  # the rest is filled in
    ]
    return unknown, len(found)


@pytest.mark.parametrize(("folder", "least"), [("library", 300), ("networks", 15), ("tools", 60)])
def test_every_word_of_a_message_is_an_option(folder: str, least: int) -> None:
    found = {path.as_posix(): find_unknown(text_of(path), known_to(path)) for path in python_files(folder)}
    assert {path: unknown for path, (unknown, _) in found.items() if unknown} == {}
    assert sum(count for _, count in found.values()) > least


def test_a_word_that_no_script_has_is_found() -> None:
    source = 'raise UserError(f"--seed is {seed}, use --sead or --discrete_flow_shift", setting="--sead")'
    assert find_unknown(source, options_of_all()) == (["sead", "sead"], 4)
    sdxl = known_to(Path("library/architectures/sdxl/load.py"))
    assert find_unknown(source, sdxl)[0] == ["sead", "discrete_flow_shift", "sead"]
