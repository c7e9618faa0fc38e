"""The options that sdxl_train_network.py adds to those of train_network.py are an interface."""

import json
from pathlib import Path
from typing import Any

import pytest

from library.architectures.sdxl.options import SdxlOptions
from library.options.train import TrainOptions
from sdxl_train_network import setup_parser
from tests.contracts.test_flags import actions_of, described

DATA = Path(__file__).parent / "data"
ADDED: list[dict[str, Any]] = json.loads((DATA / "flags_sdxl_train_network.json").read_text(encoding="utf-8"))
OURS = {"text_cache_variants", "text_encoder_batch_size", "correct_crop_coordinates"}  # what sd-scripts has not here


@pytest.mark.parametrize("wanted", ADDED, ids=lambda flag: flag["dest"])
def test_option_is_declared_as_listed(wanted: dict[str, Any]) -> None:
    assert described(setup_parser()._option_string_actions[wanted["flags"][0]]) == wanted


def test_there_is_no_option_beside_the_lists() -> None:
    names = {action.dest for action in actions_of(setup_parser())}
    assert names - set(TrainOptions.defaults()) == {flag["dest"] for flag in ADDED} | OURS
    assert names >= set(TrainOptions.defaults())
    assert len(ADDED) == 3


def test_each_option_tells_in_its_own_words_what_it_does() -> None:
    actions = actions_of(setup_parser())
    assert len({action.help for action in actions}) == len(actions)


def test_the_parser_gives_the_options() -> None:
    options = SdxlOptions.from_args(setup_parser().parse_args(["--correct_crop_coordinates", "--v_parameterization"]))
    assert options.sizes.correct_crop_coordinates and options.model.v_parameterization
    assert not options.text_caching.cache_text_encoder_outputs
