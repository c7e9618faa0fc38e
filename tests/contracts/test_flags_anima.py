"""The options that anima_train_network.py adds to those of train_network.py are an interface."""

import json
from pathlib import Path
from typing import Any

import pytest

from anima_train_network import setup_parser
from library.architectures.anima.options import AnimaOptions
from library.options.train import TrainOptions
from tests.contracts.help_texts import find_help_problems
from tests.contracts.test_flags import OF_MUSUBI_FOR_FLOW_MODELS, SINCE_0_11_OF_FLOW_MODELS, actions_of, describe

DATA = Path(__file__).parent / "data"
ADDED: list[dict[str, Any]] = json.loads((DATA / "flags_anima_train_network.json").read_text(encoding="utf-8"))
OURS = {"text_cache_variants", "text_encoder_cpu"}  # options that sd-scripts does not have
SINCE_0_11 = {"qwen_image_vae_2d"}


@pytest.mark.parametrize("wanted", ADDED, ids=lambda flag: flag["dest"])
def test_option_is_declared_as_listed(wanted: dict[str, Any]) -> None:
    assert describe(setup_parser()._option_string_actions[wanted["flags"][0]]) == wanted


def test_there_is_no_unlisted_option() -> None:
    names = {action.dest for action in actions_of(setup_parser())}
    added = {flag["dest"] for flag in ADDED} | OURS | SINCE_0_11 | SINCE_0_11_OF_FLOW_MODELS.keys()
    added |= OF_MUSUBI_FOR_FLOW_MODELS
    assert names == TrainOptions.defaults().keys() | added
    assert len(ADDED) == 27


def test_every_option_has_its_own_help_text() -> None:
    assert not [*find_help_problems(actions_of(setup_parser()))]


def test_the_parser_sets_the_options() -> None:
    options = AnimaOptions.from_args(setup_parser().parse_args(["--qwen3", "q.safetensors", "--attn_mode", "sdpa"]))
    assert (options.text.qwen3, options.computing.attn_mode) == ("q.safetensors", "sdpa")
    assert (options.flow_sampling.timestep_sampling, options.flow_sampling.discrete_flow_shift) == ("sigmoid", 1.0)
