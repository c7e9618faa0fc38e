"""The command line of train_network.py is an interface: scripts, config files and front ends are written against it.

`data/flags_train_network.json` is the literal list of sd-scripts' options; changing it breaks users.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from library.options.kinds import int_or_float
from library.options.train import TrainOptions
from tests.contracts.help_texts import find_help_problems
from train_network import setup_parser

LIST = Path(__file__).parent / "data" / "flags_train_network.json"
FLAGS: list[dict[str, Any]] = json.loads(LIST.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return setup_parser()


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the actions that front ends iterate over, without --help."""
    return [action for action in parser._actions if action.dest != "help"]


def describe(action: argparse.Action, listed: dict[str, Any]) -> dict[str, Any]:
    """Describe an option as the lists do, without choices that only other programs have."""
    is_flag = isinstance(action, argparse._StoreTrueAction)
    return {
        "flags": list(action.option_strings),
        "dest": action.dest,
        "action": "store_true" if is_flag else "store",
        "type": "bool" if is_flag else action.type.__name__,
        "default": action.default,
        "nargs": action.nargs,
        "choices": action.choices and [choice for choice in action.choices if choice in listed["choices"]],
    }


def test_front_ends_get_a_flat_parser_without_required_options(parser: argparse.ArgumentParser) -> None:
    assert not any(action.required for action in actions_of(parser))
    assert all(action.option_strings for action in actions_of(parser))
    assert vars(parser.parse_args([])) == TrainOptions.defaults()


def test_only_flags_have_no_type(parser: argparse.ArgumentParser) -> None:
    """Front ends show an option whose type is None as a check box."""
    for action in actions_of(parser):
        assert (action.type is None) == (action.nargs == 0), action.dest


def test_a_help_that_front_ends_cut_is_named_with_the_reason() -> None:
    texts = ("Rank and/or alpha of it.", "Rank of the adapter.", "Rank of the adapter.", "Rank.")
    actions = [argparse.Action([f"--x{i}"], f"x{i}", help=text) for i, text in enumerate(texts)]
    cut, same, short = find_help_problems(actions)
    assert cut.startswith("--x0 has a / in its help, before which one front end cuts it")
    assert same == "--x2 has the help of --x1: write its own" and short.startswith("--x3 needs a help of four words")


def test_help_can_be_printed(parser: argparse.ArgumentParser) -> None:
    assert "--network_module" in parser.format_help()


@pytest.mark.parametrize(
    ("short", "dest"),
    [
        ("--debiased_estimation", "debiased_estimation_loss"),
        ("--pretrained_model", "pretrained_model_name_or_path"),
        ("--gradient_check", "gradient_checkpointing"),
        ("--min_snr", "min_snr_gamma"),
        ("--mixed", "mixed_precision"),
    ],
)
def test_unambiguous_abbreviations_of_flags_are_accepted(
    parser: argparse.ArgumentParser, short: str, dest: str
) -> None:
    words = {None: ["5"], 0: []}[parser._option_string_actions[f"--{dest}"].nargs]
    words = ["bf16"] if dest == "mixed_precision" else words
    assert getattr(parser.parse_args([short, *words]), dest) not in (None, False)


def test_equals_sign_and_space_are_equivalent(parser: argparse.ArgumentParser) -> None:
    for words in (["--network_dim=7"], ["--network_dim", "7"]):
        assert parser.parse_args(words).network_dim == 7


def test_the_last_of_repeated_lists_wins(parser: argparse.ArgumentParser) -> None:
    args = parser.parse_args(["--network_args", "conv_dim=4", "a=b=c", "--network_args", "conv_dim=8"])
    assert args.network_args == ["conv_dim=8"]
    assert parser.parse_args(["--text_encoder_lr", "1e-5", "2e-5"]).text_encoder_lr == [1e-5, 2e-5]


@pytest.mark.parametrize("words", [["--no_such_option"], ["--mixed_precision", "fp32"], ["--max_token_length", "100"]])
def test_an_invalid_option_exits_with_status_2(parser: argparse.ArgumentParser, words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(words)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("100", 100), ("0.1", 0.1), ("5%", 0.05), ("0.0", 0.0), ("-2", -2.0)]
)
def test_warmup_is_a_number_of_steps_or_a_fraction(text: str, number: float) -> None:
    assert int_or_float(text) == number
    assert isinstance(int_or_float(text), int) == (text == "100")  # 0 is a float in sd-scripts too


@pytest.mark.parametrize("text", ["1.0", "100.0", "1e2", "100%", "nan", "ten"])
def test_ambiguous_warmup_is_rejected(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        int_or_float(text)


def test_options_hold_the_values_from_the_command_line(parser: argparse.ArgumentParser) -> None:
    options = TrainOptions.from_args(parser.parse_args(["--unet_lr", "3e-5", "--dataset_config", "data.toml"]))
    assert options.network.unet_lr == 3e-5
    assert options.dataset.dataset_config == Path("data.toml")
    assert options.flat() == {**TrainOptions.defaults(), "unet_lr": 3e-5, "dataset_config": Path("data.toml")}
