"""The command line of sd3_train_network.py: that of train_network.py, and 25 options of its own as sd-scripts has."""

import json
from pathlib import Path
from typing import Any

import pytest

from sd3_train_network import setup_parser
from tests.contracts.test_flags import FLAGS, OURS, actions_of, described

ADDED: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "flags_sd3_train_network.json").read_text(encoding="utf-8")
)
OURS_HERE = {*OURS, "text_cache_variants"}


@pytest.mark.parametrize("wanted", [*FLAGS, *ADDED], ids=lambda flag: flag["dest"])
def test_option_is_declared_as_listed(wanted: dict[str, Any]) -> None:
    found = described(setup_parser()._option_string_actions[wanted["flags"][0]])
    assert found == wanted
    assert type(found["default"]) is type(wanted["default"])


def test_there_is_no_option_beside_the_lists() -> None:
    assert len(ADDED) == 25
    assert {action.dest for action in actions_of(setup_parser())} == {f["dest"] for f in [*FLAGS, *ADDED]} | OURS_HERE


def test_each_option_tells_what_it_does() -> None:
    helps = {action.dest: action.help or "" for action in actions_of(setup_parser())}
    assert len(set(helps.values())) == len(helps)
    for dest, text in helps.items():
        shown = text.split("/")[0]  # all that one front end shows
        assert len(shown.split()) >= 4 and shown.endswith("."), dest
