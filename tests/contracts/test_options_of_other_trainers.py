"""Every option of sd-scripts and of musubi-tuner is taken, with its default or another, without effect, or refused.

`data/options_<trainer>.json` are their options: of sd-scripts by the version that brought them, those of 0.12.1 and
0.12.2 as read in its release notes, and of musubi-tuner at commit 30c658c (0.3.4). Replacing a list shows what is new.
"""

import argparse
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from library.architectures.scripts import Script, list_scripts
from library.options.dit import DitTrainOptions

DATA = Path(__file__).parent / "data"
SCRIPTS = {script.name: script for script in list_scripts()}


@dataclass(frozen=True)
class Trainer:
    """A program whose commands run here, and what is taken otherwise than there, with the reason."""

    name: str
    scripts: Sequence[str]
    other_defaults: Mapping[str, str] = field(default_factory=dict)
    refused_choices: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def options(self) -> list[dict[str, Any]]:
        options: list[dict[str, Any]] = json.loads((DATA / f"options_{self.name}.json").read_text(encoding="utf-8"))
        return options


SD_SCRIPTS = Trainer(
    "sd_scripts",
    [f"{name}train_network.py" for name in ("", "anima_", "flux_", "hunyuan_image_", "lumina_", "sd3_", "sdxl_")],
)
MUSUBI_TUNER = Trainer(
    "musubi_tuner",
    [name for name, script in SCRIPTS.items() if issubclass(script.options, DitTrainOptions)],
    other_defaults={
        "dynamo_backend": "the backend of --torch_compile; an upper-case name selects compiling by itself, as there",
        "mixed_precision": "no is accelerate's default there",
        "timestep_sampling": "what the base model's makers advise",
        "discrete_flow_shift": "what the base model's makers advise",
        "weighting_scheme": "uniform and none are the same",
    },
    refused_choices={"timestep_sampling": ["ideogram4_shift"]},  # of a base model that this suite does not have
)
CASES = [(trainer, script) for trainer in (SD_SCRIPTS, MUSUBI_TUNER) for script in trainer.scripts]


@cache
def actions_of(script: str) -> dict[str, argparse.Action]:
    parser = importlib.import_module(script.removesuffix(".py")).setup_parser()
    return {action.dest: action for action in parser._actions}


def sort_option(trainer: Trainer, script: Script, option: dict[str, Any]) -> str:
    """Return how `script` takes an option of a trainer, with the reason where it does so otherwise."""
    action, facts = actions_of(script.name).get(option["name"]), script.options.declarations().get(option["name"])
    if action is None or facts is None:
        return "unsorted: refused"
    if facts.unsupported is not None and not facts.needs.names:
        return f"refused: {facts.unsupported}"
    if action.choices is not None:
        missing = [choice for choice in option.get("choices", []) if choice not in action.choices]
        if missing != list(trainer.refused_choices.get(option["name"], [])):
            return f"unsorted: refuses {missing}"
    if facts.ignored is not None:
        return f"no effect: {facts.ignored}"
    # An empty text and 0 are no choice where nothing is the default.
    if action.default not in (option["default"], option["default"] or None):
        reason = trainer.other_defaults.get(option["name"])
        return "unsorted: default" if reason is None else f"other default: {reason}"
    return "same"


@pytest.mark.parametrize(("trainer", "name"), CASES, ids=lambda value: getattr(value, "name", value))
def test_every_option_is_sorted(trainer: Trainer, name: str) -> None:
    options = [o for o in trainer.options if o["scripts"] == "every script" or name in o["scripts"]]
    assert len(options) > 100
    sorted_options = {o["name"]: sort_option(trainer, SCRIPTS[name], o) for o in options}
    unsorted = {option: how for option, how in sorted_options.items() if how.startswith("unsorted")}
    assert not unsorted, f"{name} takes these otherwise than {trainer.name}; say how in this file: {unsorted}"
    assert "same" in sorted_options.values()


def test_a_new_option_or_value_is_shown_as_unsorted() -> None:
    script = SCRIPTS[MUSUBI_TUNER.scripts[0]]
    for option, how in (
        ({"name": "brand_new", "default": None}, "refused"),
        ({"name": "network_alpha", "default": 2.0}, "default"),
        ({"name": "save_precision", "default": None, "choices": ["fp8"]}, "refuses ['fp8']"),
    ):
        assert sort_option(MUSUBI_TUNER, script, option) == f"unsorted: {how}"
