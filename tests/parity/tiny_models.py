"""Tiny base models, opened as in a run."""

import importlib
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch

from library.options.train import TrainOptions
from library.protocols import Architecture
from library.training.command_line.cli import parse
from tests.running import SCRIPTS
from tests.tiny.bases import BASES


def open_run(name: str, arguments: list[str]) -> Any:
    """Return what previews take of a run, with the models of the files that the arguments select."""
    spec = BASES[name].spec
    parser = importlib.import_module(BASES[name].script).setup_parser()
    arch = spec.build(spec.options.from_args(parser.parse_args(arguments)))
    models = SimpleNamespace(denoiser=arch.load.denoiser(), text_encoders=arch.load.text_encoders())
    return SimpleNamespace(arch=arch, models=models, device=torch.device("cpu"), autocast=nullcontext)


def opened_with(name: str, arguments: list[str]) -> tuple[TrainOptions, Architecture]:
    """Return options and architecture for a small adapter, given the arguments that select the model files."""
    base = BASES[name]
    spec = SCRIPTS[base.script]
    command = [*arguments, "--network_module", base.module, "--network_dim", "4"]
    options = spec.options.from_args(parse(importlib.import_module(base.script).setup_parser(), command))
    return options, spec.build(options)
