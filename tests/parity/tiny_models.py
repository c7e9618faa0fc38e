"""Tiny base models, opened as in a run."""

import importlib

from library.options.train import TrainOptions
from library.protocols import Architecture
from library.training.command_line.cli import parse
from tests.running import SCRIPTS
from tests.tiny.bases import BASES


def opened_with(name: str, arguments: list[str]) -> tuple[TrainOptions, Architecture]:
    """Return options and architecture for a small adapter, given the arguments that select the model files."""
    base = BASES[name]
    spec = SCRIPTS[base.script]
    command = [*arguments, "--network_module", base.module, "--network_dim", "4"]
    options = spec.options.from_args(parse(importlib.import_module(base.script).setup_parser(), command))
    return options, spec.build(options)
