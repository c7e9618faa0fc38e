"""The documentation agrees with the program: commands, files, options, links and examples."""

import argparse
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import train
from benchmarks.recipe_heads import list_lines, write_head
from library.architectures.scripts import OtherScripts, Script, list_scripts
from library.architectures.specs import list_network_arguments, list_specs
from library.base.version import VERSION
from library.data.concepts.prompts_file import PAIR_KEYS, SLIDER_KEYS, read_prompt_pairs
from library.data.description.dataset_file import load_dataset_config
from library.data.description.schema import ALL_KEYS, RunDataConfig
from library.memory.planner.known import load_models
from library.options.leco import leco_options
from library.options.output.prompts import KINDS, LINE_OPTIONS, read_prompts
from library.options.requirements import unsupported
from library.options.train import TrainOptions
from library.training.command_line.cli import build_parser_of_prompts
from library.training.command_line.recipes import FOLDER, list_recipes
from library.training.config_file import read_config
from library.training.sweep.combinations import expand_combinations
from networks.core.registry.parsing import parse_arguments
from tools import choose_checkpoint, contact_sheet, make_shards, plan_memory, run_queue, start, verify
from tools.capabilities import list_tools
from train_network import setup_parser

ROOT = Path(__file__).parents[2]
TOYS = ROOT / "benchmarks" / "toys" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", TOYS, *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
FLAGS_OF_OTHERS = {
    *("--folder", "--gpus", "--now"),  # of the commands of tools/run_queue.py
    "--venv",
    "--slow",
    "--locked",
    "--newest",
    "--torch",
    "--offline",
    "--help_all",
}  # tools/start.py; a word of no parser


def blocks_of(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a page in one language."""
    return [text for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def commands_of(page: Path) -> list[str]:
    """Return the commands of a page's bash blocks, with continued lines joined."""
    lines = "".join(blocks_of(page, "bash")).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


COMMANDS = [(page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in commands_of(page)]


def check_command(command: str) -> None:
    """Raise AssertionError if the command would be rejected or is of an unknown kind."""
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=\w*", words[0]):  # a variable for this command alone
        words = words[1:]
    for word in words:
        assert not word.startswith("configs/") or (ROOT / word).exists(), f"{word} is not there"
    match words:
        case ["source", ".venv/bin/activate"]:
            return
        case ["seq", _, "|", "xargs", *arguments]:  # runs of a sweep, two at a time
            words = arguments[arguments.index("python3") + 1 :]
            check_script(words[0], [word.replace("{}", "1") for word in words[1:]])
        case ["accelerate", "launch", *arguments]:
            check_launch(arguments)
        case ["python3" | "python", "-m", "pip", *_]:
            return  # always installed; find_spec would make setuptools drop its distutils
        case ["python3" | "python", "-m", "benchmarks" | "benchmarks.toys" as package, name, *arguments]:
            parse(importlib.import_module(f"{package}.{name}").setup_parser(), arguments)
        case ["python3" | "python", "-m", module, *_]:
            assert importlib.util.find_spec(module) is not None, f"the requirements bring no module {module}"
        case ["python3", "tools/start.py", "train", *arguments] | ["python3" | "python", "train.py", *arguments]:
            parse(train.setup_parser(), arguments)
        case ["python3" | "python", "tools/start.py", *arguments]:
            parse(start.setup_parser(), start.split_at_dashes(arguments)[0])
        case ["python3" | "python", "tools/plan_memory.py" | "tools/verify.py" as tool, *arguments]:
            own_args, training = (plan_memory if "plan" in tool else verify).setup_parser().parse_known_args(arguments)
            if own_args.script or training:  # else usual trainings are planned
                check_script(own_args.script, training)
        case ["python3" | "python", "tools/contact_sheet.py" | "tools/choose_checkpoint.py" as tool, *arguments]:
            module = contact_sheet if "sheet" in tool else choose_checkpoint
            own_args, training = module.setup_parser().parse_known_args(arguments)
            check_script(own_args.script, training)
        case ["python3" | "python", "tools/make_shards.py", *arguments]:
            own_args, training = make_shards.setup_parser().parse_known_args(arguments)
            check_script(own_args.script or "train_network.py", training)
        case ["python3" | "python", "tools/run_queue.py", *arguments]:
            own, training = start.split_at_dashes(arguments)
            args = parse(run_queue.setup_parser(), own)
            if args.command == "add":
                check_script(args.script or "train_network.py", ["--config_file", str(args.config), *training])
        case ["python3", "tools/cache_latents.py" | "tools/cache_text_encoder_outputs.py" as tool, family, *arguments]:
            check_script(f"src/musubi_tuner/{family.removeprefix('--')}_{Path(tool).name}", arguments)
        case ["python3" | "python", script, *arguments] if script.startswith("tools/"):
            check_tool(script, arguments)
        case ["python3" | "python", script, *arguments]:
            check_script(script, arguments)
        case _:
            raise AssertionError(f"no check for `{command}`: add one to {Path(__file__).name}")


def check_launch(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    launch = parse(launch_command_parser(), arguments)
    check_script(launch.training_script, launch.training_script_args)


def parser_of(script: str, arguments: list[str]) -> argparse.ArgumentParser:
    """Return the script's parser; for train_leco.py, that of the first base model with all of these options."""
    default: argparse.ArgumentParser = importlib.import_module(
        script.removesuffix(".py").replace("/", ".")
    ).setup_parser()
    if script != "train_leco.py":
        return default
    flags = {word.split("=")[0] for word in arguments if word.startswith("--")}
    kinds = [leco_options(spec.options) for spec in list_specs()]
    others = (build_parser_of_prompts(kind, OtherScripts(script)) for kind in kinds)
    return next((parser for parser in (default, *others) if flags <= parser._option_string_actions.keys()), default)


def check_script(script: str, arguments: list[str]) -> None:
    """Parse a training script's arguments. Abbreviations fail: a page must show full option names.

    Raise ValueError for an invalid network argument.
    """
    assert (ROOT / script).exists(), f"{script} is not there"
    if arguments in (["--help"], ["--help_all"]):
        return
    parser = parser_of(script, arguments)
    for word in arguments:
        flag = word.split("=")[0]
        assert not word.startswith("--") or flag in parser._option_string_actions, f"{script} has no option {flag}"
    args = parse(parser, arguments)
    options = TrainOptions.from_args(args)
    assert not unsupported(options)
    if options.sweep.sweep:
        expand_combinations(options)
    if args.network_module and args.network_module.startswith("networks."):
        network_args = dict(item.split("=", 1) for item in args.network_args or ())
        parse_arguments(network_args, args.network_dropout, list_network_arguments())
    if args.config_file and not args.output_config:
        actions = {action.dest: action for action in parser._actions}
        assert read_config(ROOT / args.config_file, actions).warnings == []


def check_tool(script: str, arguments: list[str]) -> None:
    options = options_of_tools().get(script)
    assert options is not None, f"{script} shows no help"
    for word in arguments:
        flag = word.split("=")[0]
        assert not word.startswith("--") or flag in options, f"{script} has no option {flag}"


SHOW_HELP = """
import contextlib, io, json, runpy, sys
texts = {}
for script in sys.argv[1:]:
    sys.path[0], sys.argv = script.rpartition("/")[0], [script, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    texts[script] = text.getvalue()
print(json.dumps(texts))
"""


@cache
def options_of_tools() -> dict[str, frozenset[str]]:
    """Return the options in the help of every tool that pages name, collected in one subprocess."""
    words = {word for _, command in COMMANDS for word in shlex.split(command)}
    tools = {word for word in words if re.match("tools/.*[.]py$", word)} - {"tools/start.py"}
    scripts = sorted(word for word in tools if (ROOT / word).exists())
    shown = subprocess.run([sys.executable, "-c", SHOW_HELP, *scripts], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    return {script: frozenset(FLAG.findall(text)) for script, text in json.loads(shown.stdout).items() if text}


def parse(parser: argparse.ArgumentParser, arguments: list[str]) -> argparse.Namespace:
    """Parse, turning argparse's exit into a failure."""
    try:
        return parser.parse_args(arguments)
    except SystemExit as ended:
        raise AssertionError(f"does not parse: {shlex.join(arguments)}") from ended


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_documented_command_is_valid(page: str, command: str) -> None:
    check_command(command)


@pytest.mark.slow
def test_the_commands_of_the_results_are_valid() -> None:
    page = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    commands = [code for code in INLINE_CODE.findall(page) if code.startswith("python -m benchmarks")]
    assert len(commands) > 20
    for command in commands:
        check_command(command)


@pytest.mark.slow
def test_the_batch_file_of_the_windows_page_is_valid() -> None:
    _, batch = blocks_of(ROOT / "docs" / "windows.md", "bat")
    lines = batch.replace("^\n", " ").replace("\\", "/").splitlines()
    assert lines[:2] == ["@echo off", "call .venv/Scripts/activate"]
    (command,) = (line for line in lines if line.startswith("python "))
    check_command(command)


@pytest.mark.slow
def test_readme_shows_both_commands_and_a_real_training() -> None:
    commands = commands_of(ROOT / "README.md")
    assert "python3 tools/start.py quickstart" in commands
    assert "python3 tools/start.py test" in commands
    assert any(command.startswith("python3 tools/start.py train ") for command in commands)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "make all",
        "python3 tools/start.py quickfinish",
        "python3 tools/no_such_tool.py",
        "python3 -m no_such_module",
        "python3 -m benchmarks gpu_step --no_such_option 1",
        "accelerate launch no_such_script.py",
        "accelerate launch train_network.py --no_such_option 1",
        "accelerate launch train_network.py --network_modul networks.lora",
        "accelerate launch train_network.py --network_dim four",
        "accelerate launch train_network.py --dataset_config configs/no_such_file.toml",
        "accelerate launch train_network.py --deepspeed",
        "accelerate launch train_network.py --network_module networks.lora --network_args conv_rank=4",
    ],
)
def test_wrong_command_is_noticed(command: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        check_command(command)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_named_in_the_text_exist(page: Path) -> None:
    from accelerate.commands.launch import launch_command_parser

    known = {*FLAGS_OF_OTHERS, *(f"--{letters}" for letters in LINE_OPTIONS)}
    known |= set(launch_command_parser()._option_string_actions)
    scripts = (path.stem for path in ROOT.glob("*train_*.py"))
    for module in ("train", *scripts, *(f"tools.{path.stem}" for path in list_tools())):
        known |= set(importlib.import_module(module).setup_parser()._option_string_actions)
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    code = [part for part in INLINE_CODE.findall(text) if not part.startswith(("python3 ", "ruff ", "mypy "))]
    mentioned = {flag for part in code for flag in FLAG.findall(part)}
    assert mentioned - known == set()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_exist(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith("https://") and not (page.parent / t).exists()]
    assert missing == []


def headings_of(page: Path) -> set[str]:
    """Return the anchors that GitHub derives from a page's headings."""
    lines = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_headings_exist(page: Path) -> None:
    links = re.findall(r"\]\(([\w./]*\.md)?#([^)]+)\)", page.read_text(encoding="utf-8"))
    broken = [f"{file}#{name}" for file, name in links if name not in headings_of(page.parent / file if file else page)]
    assert broken == []


def table_rows(page: Path) -> list[list[str]]:
    """Return the cells of every table row of a page."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


@pytest.mark.slow
def test_the_index_lists_every_training_script() -> None:
    first_cells = [row[0] for row in table_rows(ROOT / "docs" / "README.md")]
    listed = {name for cell in first_cells for name in re.findall(r"`(\w*train_(?:network|leco)\.py)`", cell)}
    assert listed == {path.name for path in ROOT.glob("*train_*.py")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [script for script in list_scripts() if script.files], ids=lambda script: script.name
)
def test_the_page_of_a_script_says_where_its_files_are(script: Script) -> None:
    rows = table_rows(ROOT / "docs" / f"{script.name.removesuffix('.py')}.md")
    listed = {tuple(row) for row in rows if row[0].startswith("`--") and "huggingface.co" in row[1]}
    assert listed == {
        (
            f"`--{file.flag}`",
            f"`{file.file or 'the folder'}` of [{file.repository}](https://huggingface.co/{file.repository})",
            "" if file.gigabytes is None else f"{file.gigabytes:g} GB",
            file.licence or "",
        )
        for file in script.files
    }


@pytest.mark.slow
def test_the_page_of_adapter_kinds_lists_every_network_module() -> None:
    first_cells = [row[0] for row in table_rows(ROOT / "docs" / "networks.md")]
    listed = {name for cell in first_cells for name in re.findall(r"`(networks\.\w+)`", cell)}
    files = (path for path in (ROOT / "networks").glob("*.py") if "create_network" in path.read_text(encoding="utf-8"))
    assert listed == {f"networks.{path.stem}" for path in files}


@pytest.mark.slow
def test_options_that_the_page_calls_unsupported_are_refused() -> None:
    page = (ROOT / "docs" / "train_network.md").read_text(encoding="utf-8")
    unsupported = set(FLAG.findall(page.split("## Not supported yet")[1]))
    facts_of = TrainOptions.declarations()
    assert unsupported == {
        f"--{name}" for name, facts in facts_of.items() if facts.unsupported and not facts.needs.names
    }


@pytest.mark.slow
def test_the_page_about_sweeps_is_short() -> None:
    assert len((ROOT / "docs" / "sweep.md").read_text(encoding="utf-8").split()) <= 400


# Dataset files that the documentation shows and the repository ships are accepted, and every key is explained.

EXAMPLES = sorted((ROOT / "configs" / "examples").glob("*.toml"))
SHOWN = [(page.name, block) for page in PAGES for block in blocks_of(page, "toml") if "[[datasets]]" in block]


def load(path: Path) -> RunDataConfig:
    masked = ["--masked_loss"] if "conditioning_data_dir" in path.read_text(encoding="utf-8") else []
    args = setup_parser().parse_args(["--dataset_config", str(path), "--resolution", "64", *masked])
    return load_dataset_config(TrainOptions.from_args(args))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_dataset_file_is_accepted(path: Path) -> None:
    assert load(path).datasets


def test_the_page_starts_with_the_file_named_in_the_commands() -> None:
    page, example = ROOT / "docs" / "dataset_config.md", ROOT / "configs" / "examples" / "dataset.toml"
    assert blocks_of(page, "toml")[0] == example.read_text(encoding="utf-8")


def test_the_example_leaves_size_batch_and_shuffling_to_the_recipe() -> None:
    (dataset,) = load(ROOT / "configs" / "examples" / "dataset.toml").datasets
    assert (dataset.resolution, dataset.batch_size, dataset.enable_bucket) == ((64, 64), 1, False)
    assert not any(subset.captions.moves_tags or subset.flip_aug for subset in dataset.subsets)


@pytest.mark.parametrize(("page", "block"), SHOWN)
def test_dataset_file_of_the_documentation_is_accepted(page: str, block: str, tmp_path: Path) -> None:
    (tmp_path / "dataset.toml").write_text(block, encoding="utf-8")
    assert load(tmp_path / "dataset.toml").datasets


def test_every_key_of_a_dataset_file_is_explained_once() -> None:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    table = page.partition("## Keys of a dataset file\n")[2].partition("\n## ")[0]
    explained = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(explained) == sorted(ALL_KEYS)


# LECO prompt files in the documentation and the repository are readable, and every key is explained.

PAGE = ROOT / "docs" / "train_leco.md"
SHIPPED = sorted((ROOT / "configs" / "leco").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_prompt_file_is_readable(path: Path) -> None:
    assert read_prompt_pairs(path)


@pytest.mark.parametrize("block", blocks_of(PAGE, "toml"))
def test_documented_prompt_file_is_readable(tmp_path: Path, block: str) -> None:
    path = tmp_path / "prompts.toml"
    path.write_text(block, encoding="utf-8")
    assert read_prompt_pairs(path)


def test_the_page_shows_the_file_named_in_its_first_command() -> None:
    lines = (ROOT / "configs" / "leco" / "erase.toml").read_text(encoding="utf-8").splitlines()
    plain = [line.partition("#")[0].rstrip() for line in lines if line.partition("#")[0].strip()]
    assert blocks_of(PAGE, "toml")[0].splitlines() == plain


def test_the_page_explains_every_key() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert [key for key in (*PAIR_KEYS, *SLIDER_KEYS) if f"`{key}`" not in text] == []


# Prompt files in the documentation and the repository are readable, and every setting is explained.

PROMPTS_PAGE = ROOT / "docs" / "previews.md"
SHOWN_PROMPTS = [("txt", block) for block in blocks_of(PROMPTS_PAGE, "")]
SHOWN_PROMPTS += [(language, block) for language in ("toml", "json") for block in blocks_of(PROMPTS_PAGE, language)]


@pytest.mark.parametrize("path", [*sorted((ROOT / "configs").glob("*/prompts.txt"))], ids=str)
def test_shown_prompt_file_is_readable(path: Path) -> None:
    assert read_prompts(path)


@pytest.mark.parametrize(("kind", "block"), SHOWN_PROMPTS)
def test_documented_prompts_are_readable(tmp_path: Path, kind: str, block: str) -> None:
    path = tmp_path / f"prompts.{kind}"
    path.write_text(block, encoding="utf-8")
    assert read_prompts(path)


def test_the_page_shows_every_file_format_and_explains_every_setting() -> None:
    assert {kind for kind, _ in SHOWN_PROMPTS} == {"txt", "toml", "json"}
    text = PROMPTS_PAGE.read_text(encoding="utf-8")
    assert [key for key in KINDS if f"`{key}`" not in text] == []
    assert [letters for letters in LINE_OPTIONS if f"`--{letters}`" not in text] == []


# CHANGELOG.md begins with the version that pyproject.toml and --version have.


def test_the_first_entry_is_for_the_current_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (\d+\.\d+\.\d+)", text, re.MULTILINE)
    assert versions and versions[0] == VERSION


def test_paths_and_links_in_the_changelog_exist() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:tools|docs|configs)/[\w./]+)`|\]\((docs/[\w.]+)", text):
        assert (ROOT / (path[0] or path[1])).exists(), path


# The heads of the recipes say what `benchmarks/recipe_heads.py --write` writes.


def test_the_heads_are_up_to_date() -> None:
    models = {model.title: model for model in load_models()}
    for recipe in list_recipes():
        text = (FOLDER / f"{recipe.name}.toml").read_text(encoding="utf-8")
        assert write_head(text, list_lines(recipe, models)) == text, recipe.name


def test_heads_without_a_counted_model_say_how_often_a_photo_is_seen() -> None:
    heads = {recipe.name: list_lines(recipe, {}) for recipe in list_recipes()}
    assert heads["toy_character"] == ["# Of 30 photos each is seen 107 times."]
    assert all(len(lines) == 1 for lines in heads.values())
