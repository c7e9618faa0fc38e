"""The options of each script are an interface; the others add theirs to those of train_network.py.

`data/flags_<script>.json` are the literal lists of sd-scripts' options; for base models that sd-scripts does not train,
those that commands and settings written for musubi-tuner and for this suite use.
"""

import argparse
import importlib
import json
from functools import cache
from typing import Any

import pytest

from library.architectures.specs import list_specs
from tests.contracts.help_texts import find_help_problems
from tests.contracts.test_flags import FLAGS, LIST, actions_of, describe
from tests.running import STARTED

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
