"""Tiny base models as a run opens them."""

import importlib

from library.options.train import TrainOptions
from library.protocols import Architecture
from library.training.command_line.cli import parse
from tests.running import SCRIPTS
from tests.runs.bases import BASES


def opened_with(name: str, arguments: list[str]) -> tuple[TrainOptions, Architecture]:
    """Options and parts, for a small adapter, by the arguments that name the files of a model."""
    base = BASES[name]
    card = SCRIPTS[base.script]
    given = [*arguments, "--network_module", base.module, "--network_dim", "4"]
    options = card.options.from_args(parse(importlib.import_module(base.script).setup_parser(), given))
    return options, card.build(options)
