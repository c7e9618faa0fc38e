"""The printed help, and errors for invalid options."""

import argparse
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from library.training.command_line.cli import parse
from tests.running import ROOT, SCRIPTS
from tests.tiers import first_is_fast


def parser_of(script: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = importlib.import_module(script).setup_parser()
    return parser


def shown(script: str, word: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the output of a script run with one argument; it must exit with status 0."""
    with pytest.raises(SystemExit) as ended:
        parse(parser_of(script), [word])
    assert ended.value.code == 0
    return capsys.readouterr().out


def options_in(text: str) -> set[str]:
    """Return the options that have their own entry."""
    return set(re.findall(r"^  (--\w+)", text, re.MULTILINE))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_common_options_and_help_all_shows_every_option(
    script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    every = {flag for action in parser_of(script)._actions for flag in action.option_strings} - {"-h", "--help"}
    text = shown(script, "--help", capsys)
    usual = options_in(text)
    listed = re.findall(r"^  (--\w+)", text, re.MULTILINE)
    assert listed[0] == "--pretrained_model_name_or_path" and listed.index("--learning_rate") < 10
    assert len(listed) == len(usual)
    assert {"--learning_rate", "--dataset_config", "--network_module", "--output_dir", "--resume"} < usual < every
    assert len(usual) < 90
    assert options_in(shown(script, "--help_all", capsys)) == every


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_three_examples_parse(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(script, "--help", capsys).replace("\\\n", " ")
    commands = re.findall(r"^ +python3 \S+ (.*)$", text, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert parser_of(script).parse_known_args(command.split())[1] == []


def test_help_has_the_option_groups_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(shown("train_network", "--help_all", capsys).split())
    assert "The adapter and its learning rates: --network_dropout float" in text
    assert "--huber_scale" in text and "(default: 0.1)" in text
    assert "(default: None)" not in text and "(default: False)" not in text


def test_no_option_is_hidden_from_programs_that_read_the_parser() -> None:
    for action in parser_of("flux_train_network")._actions:
        assert action.help and action.help != argparse.SUPPRESS
        assert action.dest == "help" or action.default != argparse.SUPPRESS


@pytest.mark.parametrize("word", ["--he", "--hel", "-h"])
def test_abbreviations_of_help_show_help(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--learning_rate" in shown("train_network", word, capsys)


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        (["--network_dimm", "4"], "--network_dimm (nearest: --network_dim) 4"),
        (["--network-dim=4"], "--network-dim=4 (nearest: --network_dim)"),
        (["-learning_rate", "1"], "-learning_rate (nearest: --learning_rate) 1"),
        (["--qqqq"], "--qqqq"),
    ],
)
def test_a_misspelt_flag_gives_a_one_line_error(
    typed: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(parser_of("train_network"), typed)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: unrecognized arguments: {hint}; see --help" in line


@pytest.mark.parametrize(
    ("words", "status", "answer"),
    [
        (["--help"], 0, ""),
        (["--learning_rats"], 2, "(nearest: --learning_rate)"),
        (["--train_data_dir", "imags"], 1, "--train_data_dir imags does not exist; did you mean images?"),
        (["--config_file", "wrong"], 1, "--train_batch_size is 0; use at least 1"),
        (["--dataset_config", "wrong.toml"], 1, "--pretrained_model_name_or_path is not set"),
    ],
)
@pytest.mark.parametrize("script", first_is_fast(sorted(SCRIPTS, key="train_network".__ne__)))
def test_help_and_wrong_options_are_answered_without_torch(
    script: str, words: list[str], status: int, answer: str, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "wrong.toml").write_text("train_batch_size = 0")
    check_answer_without_torch(f"{script}.py", words, status, answer, tmp_path)


def check_answer_without_torch(command: str, words: list[str], status: int, answer: str, folder: Path) -> None:
    """Run a command where torch cannot be imported, and compare its exit status and its last words."""
    (folder / "fake").mkdir()
    (folder / "fake" / "torch.py").write_text("raise AssertionError('torch is imported')")
    line = [sys.executable, "-X", "importtime", str(ROOT / command), *words]
    environment = {**os.environ, "PYTHONPATH": str(folder / "fake")}
    done = subprocess.run(line, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == status and answer in done.stderr
    imported = set(re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE))
    assert "argparse" in imported and not imported & {"torch", "numpy", "transformers", "diffusers", "accelerate"}


LECO = [*sorted(path.name for path in ROOT.glob("*train_leco.py"))]
CACHING = [
    "src/musubi_tuner/zimage_cache_latents.py",
    "tools/cache_latents.py",
    "tools/cache_text_encoder_outputs.py",
    *sorted(f"src/musubi_tuner/{path.name}" for path in ROOT.glob("src/musubi_tuner/*_cache_*.py")),
]


@pytest.mark.parametrize(
    ("words", "status", "answer"),
    [
        (["--help"], 0, ""),
        (["--learning_rats"], 2, "(nearest: --learning_rate)"),
        (["--pretrained_model_name_or_path", "modle.ckpt"], 1, "modle.ckpt does not exist; did you mean model.ckpt?"),
        (["--pretrained_model_name_or_path", "sd", "--prompts_file", "promts.toml"], 1, "did you mean prompts.toml?"),
        (["--pretrained_model_name_or_path", "sd", "--max_train_steps", "x"], 2, "argument --max_train_steps: invalid"),
    ],
)
@pytest.mark.parametrize("command", LECO)
def test_training_by_prompts_refuses_mistakes_before_it_recognises_the_base(
    command: str, words: list[str], status: int, answer: str, tmp_path: Path
) -> None:
    for name in ("model.ckpt", "prompts.toml"):
        (tmp_path / name).touch()
    check_answer_without_torch(command, words, status, answer, tmp_path)


@pytest.mark.parametrize(
    ("words", "status", "answer"),
    [
        (["--help"], 0, ""),
        (["--learning_rats"], 2, "(nearest: --learning_rate)"),
        (["--dataset_config", "dta.toml"], 1, "--dataset_config dta.toml does not exist; did you mean data.toml?"),
        (["--dataset_config", "data.toml", "--vae", "wea.safetensors"], 1, "did you mean vae.safetensors?"),
        (["--dataset_config", "data.toml", "--vae_batch_size", "0"], 1, "--vae_batch_size is 0; use at least 1"),
        ([], 1, "no images are named; give --dataset_config"),
    ],
)
@pytest.mark.parametrize("command", first_is_fast(CACHING))
def test_caching_commands_refuse_mistakes_before_torch(
    command: str, words: list[str], status: int, answer: str, tmp_path: Path
) -> None:
    for name in ("data.toml", "vae.safetensors"):
        (tmp_path / name).touch()
    check_answer_without_torch(command, words, status, answer, tmp_path)


@pytest.mark.parametrize("command", CACHING)
def test_caching_commands_have_their_own_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every option of the training is taken, though few are shown."""
    encoded = "captions" if "text" in command else "images"
    module = command.removesuffix(".py").replace("/", ".")
    text = shown(module, "--help", capsys)
    assert f"Encode the {encoded} of a data set" in text and f"What encoding the {encoded} needs:" in text
    assert {"--dataset_config", "--vae", "--skip_existing", "--mixed_precision"} <= options_in(text)
    assert len(options_in(text)) <= 60 and not {"--learning_rate", "--network_dim"} & options_in(text)
    assert {"--learning_rate", "--network_dim"} < options_in(shown(module, "--help_all", capsys))
    commands = re.findall(r"^ +python3 \S+ (.*)$", text, re.MULTILINE)
    assert len(commands) == 2
    for line in commands:
        assert parser_of(module).parse_known_args([*line.split(), "--learning_rate", "1e-4"])[1] == []
