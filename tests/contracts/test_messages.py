"""The sentences of messages.toml: what commands say of options and files that they cannot use."""

import ast
import importlib
import logging
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import toml
import torch
from safetensors.torch import load_file, save_file

from library.architectures.scripts import script_of
from library.base.errors import UserError
from library.options.leco import LecoOptions
from library.options.output.prompts import LINE_OPTIONS
from library.training.command_line.checks import check, report_unused
from library.training.command_line.cli import parse
from tests.architecture.sources import python_files, text_of
from tests.running import ROOT, SCRIPTS, Finished
from tests.tiny.base import path_argument
from tests.tiny.bases import BASES
from tests.tiny.sd import build_tiny_sd
from tests.unit.networks.toy import toy_models
from tools.capabilities import CACHING, list_tools

Row = Mapping[str, Any]
TABLE: Mapping[str, list[Row]] = toml.loads(Path(__file__).with_name("messages.toml").read_text(encoding="utf-8"))
BASE = "--pretrained_model_name_or_path"
ONE_STEP = [
    "--resolution", "64", "--network_dim", "4", "--learning_rate", "1e-4", "--max_train_steps", "1",
    "--max_data_loader_n_workers", "0", "--output_name", "mine", "--no_report",
]  # fmt: skip


def rows(kind: str, fast: tuple[str | None, ...] = ()) -> Any:
    """Return the rows of one kind as parameters; those of other base models than `fast` are slow."""
    parameters = [
        pytest.param(
            row,
            id=" ".join(
                str(row[key]) for key in ("base", "words", "shapes", "without", "module", "arguments") if key in row
            ),
            marks=() if row.get("base") in fast else pytest.mark.slow,
        )
        for row in TABLE[kind]
    ]
    return pytest.mark.parametrize("row", parameters)


def pattern_of(row: Row) -> str:
    """Return what the message must match; most rows have a part of it in plain words."""
    return str(row.get("pattern", re.escape(row.get("sentence", ""))))


@cache
def parser_of(script: str) -> Any:
    return import_module(script).setup_parser()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """Return a function that gives the options of a tiny model, which is built once."""

    @cache
    def build(name: str) -> list[str]:
        folder = tmp_path_factory.mktemp(name)
        return (
            path_argument(build_tiny_sd(folder, 5, "safetensors")) if name == "sd file" else BASES[name].build(folder)
        )

    return build


@rows("options", fast=(None,))
def test_the_sentence_about_options(row: Row, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    script = row.get("script", "train_network")
    files = [BASE, "owner/model", "--train_data_dir", ".", "--network_module", "networks.lora"]
    words = [*files, *ONE_STEP, "--output_dir", str(tmp_path), *shlex.split(row["words"])]
    options = SCRIPTS[script].options.from_args(parse(parser_of(script), words))
    caplog.clear()
    if "warning" not in row:
        with pytest.raises(UserError, match=pattern_of(row)):
            check(options)
    else:
        with caplog.at_level(logging.WARNING):
            check(options)
            report_unused(options, {})
        assert row["warning"] in caplog.text


@rows("network", fast=(None, "flux"))
def test_the_sentence_about_network_arguments(row: Row) -> None:
    module: Any = import_module(row["module"])
    deep = BASES[row["base"]].deep if "base" in row else None
    models = ([], deep.seen(deep.frozen(91))) if deep else toy_models(91)
    with pytest.raises(UserError, match=pattern_of(row)):
        module.create_network(1.0, 12, 2.0, None, *models, **row["arguments"])


@rows("file", fast=("zimage", "sd file"))
def test_the_sentence_about_a_file(row: Row, model: Callable[[str], list[str]]) -> None:
    arguments, base = list(model(row["base"])), BASES[row["base"].removesuffix(" file")]
    place = arguments.index(row.get("flag", BASE)) + 1
    state = {n: t for n, t in load_file(arguments[place]).items() if not re.search(row.get("without", r"(?!)"), n)}
    state |= {name: torch.ones(shape) for name, shape in row.get("shapes", {}).items()}
    changed = Path(arguments[place]).with_name("changed.safetensors")  # next to its tokenizer
    save_file(state, changed)
    arguments[place] = str(changed)
    with pytest.raises(UserError, match=pattern_of(row)) as error:
        load = base.spec.build(base.spec.options.from_args(parser_of(base.script).parse_args(arguments))).load
        assert load.text_encoders() and load.denoiser() and load.vae()
    changed.unlink()
    assert any(name in str(error.value) for name in (changed.name, *arguments[::2]))


@rows("run")
def test_the_sentence_of_a_run(
    row: Row, model: Callable[[str], list[str]], train: Callable[..., Finished], images: Path, tmp_path: Path
) -> None:
    base, files = BASES[row["base"]], model(row["base"])
    places = {flag.removeprefix("--"): value for flag, value in zip(files[::2], files[1::2], strict=False)}
    data = ["--train_data_dir", str(images), "--output_dir", str(tmp_path / "out"), "--network_module", base.module]
    done = train([*files, *data, *ONE_STEP, *shlex.split(row["words"].format(**places))], script=base.script)
    assert "Traceback" not in done.stderr
    patterns = [pattern_of(row), *map(re.escape, row.get("warnings", ()))]
    assert all(re.search(pattern, done.stderr) for pattern in patterns), done.stderr
    assert (done.status == 0) == ("warnings" in row) == bool(list(tmp_path.rglob("mine*")))


# Every `--word` in an error or a warning is an option: of the base model's own script below library/architectures, of
# the tool below tools/, else of some script or tool.

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
