"""The command line is an interface: scripts, config files and front ends are written against it."""

import argparse
import importlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from library.architectures.specs import list_specs
from library.options.kinds import int_or_float
from library.options.train import TrainOptions
from tests.contracts.help_texts import find_help_problems
from tests.running import STARTED
from train_network import setup_parser

# The command line of train_network.py is an interface: scripts, config files and front ends are written against it.
# `data/flags_train_network.json` is the literal list of sd-scripts' options; changing it breaks users.

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


# The options of each script are an interface; the others add theirs to those of train_network.py.
# `data/flags_<script>.json` are the literal lists of sd-scripts' options; for base models that sd-scripts does not
# train,
# those that commands and settings written for musubi-tuner and for this suite use.

SCRIPTS = sorted(path.stem.removeprefix("flags_") for path in LIST.parent.glob("flags_*.json"))
ADDED: dict[str, list[dict[str, Any]]] = {
    script: json.loads((LIST.parent / f"flags_{script}.json").read_text(encoding="utf-8")) for script in SCRIPTS
}
EVERYWHERE = {flag["dest"] for flags in ADDED.values() for flag in flags}
SAMPLING_OF_MUSUBI_TUNER = {"flux2_shift", "qwen_shift", "krea2_shift", "logsnr", "qinglong_flux", "qinglong_qwen"}


@cache
def parser_of(script: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = importlib.import_module(script).setup_parser()
    return parser


def parse(script: str, *words: str) -> argparse.Namespace:
    return parser_of(script).parse_args(words)


@pytest.mark.parametrize(
    ("script", "wanted"),
    [(script, flag) for script in SCRIPTS for flag in ADDED[script]],
    ids=lambda value: value if isinstance(value, str) else value["dest"],
)
def test_option_is_declared_as_listed(script: str, wanted: dict[str, Any]) -> None:
    actual = describe(parser_of(script)._option_string_actions[wanted["flags"][0]], wanted)
    assert actual == wanted
    assert type(actual["default"]) is type(wanted["default"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_there_is_no_unlisted_option(script: str) -> None:
    names = {action.dest for action in actions_of(parser_of(script))}
    listed = {flag["dest"] for flag in (*FLAGS, *ADDED[script])}
    options = STARTED[script].options
    own = {name for name, facts in options.declarations().items() if facts.own}
    assert names == options.defaults().keys() >= listed
    assert names <= own | EVERYWHERE


def test_every_training_script_has_a_list() -> None:
    assert {spec.script.removesuffix(".py") for spec in list_specs()} == set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_flow_models_have_the_timestep_sampling_of_musubi_tuner(script: str) -> None:
    action = parser_of(script)._option_string_actions.get("--timestep_sampling")
    if action is not None:
        assert set(action.choices or ()) >= SAMPLING_OF_MUSUBI_TUNER


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_has_its_own_help_text(script: str) -> None:
    assert not [*find_help_problems(actions_of(parser_of(script)))]


# How the options are resolved


def test_hunyuan_image_always_trains_only_the_denoiser() -> None:
    from library.architectures.hunyuan_image.options import HunyuanImageOptions

    for flags in ([], ["--network_train_unet_only"]):
        options = HunyuanImageOptions.from_args(parse("hunyuan_image_train_network", *flags))
        assert options.network.network_train_unet_only
    assert options.flow_sampling.discrete_flow_shift == 5.0


@pytest.mark.parametrize("flag", ["fp8_scaled", "fp8_base", "fp8_base_unet"])
def test_each_of_three_options_keeps_hunyuan_images_denoiser_in_8_bits(flag: str) -> None:
    from library.architectures.hunyuan_image.options import HunyuanImageOptions

    options = HunyuanImageOptions.from_args(parse("hunyuan_image_train_network", f"--{flag}"))
    assert options.precision.denoiser_format == "fp8"
    assert HunyuanImageOptions().precision.denoiser_format is None


def meanings_of_abbreviations(flags: set[str]) -> dict[str, set[str]]:
    """Return the flags that argparse accepts for each abbreviation; a full flag means itself."""
    meant: dict[str, set[str]] = {}
    for flag in flags:
        for end in range(len("--") + 1, len(flag)):
            meant.setdefault(flag[:end], set()).add(flag)
    return meant | {flag: {flag} for flag in flags}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_abbreviation_of_a_listed_option_still_means_that_option(script: str) -> None:
    listed = {flag for option in [*FLAGS, *ADDED[script]] for flag in option["flags"] if flag[:2] == "--"}
    parser = parser_of(script)
    lost = {}
    for start, meant in meanings_of_abbreviations(listed).items():
        if len(meant) == 1 and start not in listed:
            now = {flag for action, *_ in parser._get_option_tuples(start) for flag in action.option_strings}
            if now != meant:
                lost[start] = now
    assert not lost
