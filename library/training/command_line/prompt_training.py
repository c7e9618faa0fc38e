"""Starts a training on prompts alone (LECO), with the options of the recognised base model."""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from library.base.errors import UserError
from library.checkpoints.base_model_spec import BaseModelSpec
from library.data.concepts.prompts_file import read_prompt_pairs
from library.options.leco import LecoOptions, leco_options
from library.options.output.console import ConsoleOptions
from library.options.train import TrainOptions
from library.training.command_line.cli import CommandLine, build_parser_of_prompts
from library.training.command_line.console import start_run_log
from library.training.command_line.main import main, report_error
from library.training.command_line.option_checks import ignore_message
from library.training.command_line.prompt_words import read_requested
from library.training.reporting.error_fields import wants_error_line

Recognise = Callable[[str], BaseModelSpec]
"""Maps a model's file, folder or hub name to its spec; raises UserError for an unsupported model."""


def main_by_prompts(recognise: Recognise, elsewhere: Callable[[str], str], argv: Sequence[str] | None = None) -> int:
    """Recognise the base model of the command line or its config file, and train on prompts with its script's options.
    Return the exit status, like `main`.

    Without a base model the common options apply, whose checks name what is missing.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    kind: type[TrainOptions] = LecoOptions
    build: Callable[[Any], Any] = no_model
    base, prompts = read_requested(words)
    try:
        if base and prompts:  # mistakes in the prompts come first: a hub name may have to be downloaded
            read_prompt_pairs(Path(prompts), warn=ignore_message)
        spec = recognise(base) if base else None
    except UserError as error:
        start_run_log(ConsoleOptions())
        typed = Namespace(errors_json=wants_error_line(words), pretrained_model_name_or_path=base, prompts_file=prompts)
        report_error(error, CommandLine(build_parser_of_prompts(kind, elsewhere), words, typed, ()))
        return 1
    if spec is not None:
        kind, build = leco_options(spec.options), spec.build
        words = [*spec.script_flag.split(), *words]
    return main(build_parser_of_prompts(kind, elsewhere), kind, build, words)


def no_model(options: LecoOptions) -> Any:
    raise AssertionError("checks refuse a run without --pretrained_model_name_or_path")
