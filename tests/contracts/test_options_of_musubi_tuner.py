"""Every option of musubi-tuner's training scripts is taken, with its default or another, without effect, or refused.

`data/options_musubi_tuner.json` lists the options of commit 30c658c (0.3.4); replacing it shows what is new.
"""

import argparse
import importlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from library.architectures.scripts import Script, list_scripts
from library.options.dit import DitTrainOptions

OPTIONS = json.loads((Path(__file__).parent / "data" / "options_musubi_tuner.json").read_text(encoding="utf-8"))
SCRIPTS = [script for script in list_scripts() if issubclass(script.options, DitTrainOptions)]
OTHER_DEFAULT = {
    "dynamo_backend": "the backend of --torch_compile; an upper-case name selects compiling by itself, as there",
    "mixed_precision": "no is accelerate's default there",
    "timestep_sampling": "what the base model's makers advise",
    "discrete_flow_shift": "what the base model's makers advise",
    "weighting_scheme": "uniform and none are the same",
}
REFUSED_CHOICES = {"timestep_sampling": ["ideogram4_shift"]}  # of a base model that this suite does not have


@cache
def actions_of(script: str) -> dict[str, argparse.Action]:
    parser = importlib.import_module(script.removesuffix(".py")).setup_parser()
    return {action.dest: action for action in parser._actions}


def sort_option(script: Script, option: dict[str, Any]) -> str:
    """Return how `script` takes the option, with the reason where it does so otherwise than musubi-tuner."""
    action, facts = actions_of(script.name).get(option["name"]), script.options.facts().get(option["name"])
    if action is None or facts is None:
        return "unsorted: refused"
    refused = REFUSED_CHOICES.get(option["name"], [])
    if action.choices is not None:
        missing = [choice for choice in option.get("choices", []) if choice not in action.choices]
        if missing != refused:
            return f"unsorted: refuses {missing}"
    if facts.ignored is not None:
        return f"no effect: {facts.ignored}"
    if action.default not in (option["default"], None if option["default"] in ("", 0) else option["default"]):
        reason = OTHER_DEFAULT.get(option["name"])
        return "unsorted: default" if reason is None else f"other default: {reason}"
    return "same"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_option_is_sorted(script: Script) -> None:
    options = [o for o in OPTIONS if o["scripts"] == "every script" or script.name in o["scripts"]]
    assert len(options) > 100
    unsorted = {o["name"]: how for o in options if (how := sort_option(script, o)).startswith("unsorted")}
    assert not unsorted, f"{script.name} takes these otherwise than musubi-tuner; say how in this file: {unsorted}"


def test_a_new_option_is_shown_as_unsorted() -> None:
    assert sort_option(SCRIPTS[0], {"name": "brand_new", "default": None}) == "unsorted: refused"
    assert sort_option(SCRIPTS[0], {"name": "network_alpha", "default": 2.0}) == "unsorted: default"
