"""--sweep on a command line: which script its runs are started with, and what is checked before the first of them."""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from library.base.errors import UserError, error_in
from library.options.train import TrainOptions
from library.training.command_line.cli import (
    CommandLine,
    log_user_error,
    normalize,
    parse_words,
    script_name,
    unset_empty,
)
from library.training.sweep.commands import Script
from library.training.sweep.driver import run_sweep
from library.training.sweep.worker import RunSize

ROOT = Path(__file__).parents[3]  # the folder of the scripts


def open_script(parser: argparse.ArgumentParser, kind: type[TrainOptions], has_command: bool = True) -> Script[Any]:
    """Return the script with this parser."""
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}

    def read(words: Sequence[str]) -> TrainOptions:
        return kind.from_args(normalize(unset_empty(parse_words(parser, words), parser)))

    return Script(ROOT / script_name(parser), actions, read, has_command)


def sweep_by_command(
    command_line: CommandLine, kind: type[TrainOptions], find_build: Callable[[], Callable[[Any], Any]]
) -> int:
    """Train the runs of --sweep, and return the exit status. `find_build` returns the function that builds the
    architecture from options; it is called in another process, unless torch is imported here."""
    args = command_line.start_log()
    try:
        script = open_script(command_line.parser, kind)
        return run_sweep(script, kind.from_args(args), partial(check_runs, find_build))
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and error.filename is None:  # the operating system has refused nothing for a file
            raise
        log_user_error(error, command_line)
        command_line.print_error(error)
    return 1


def sweep_for_program(parser: argparse.ArgumentParser, options: TrainOptions, build: Callable[[Any], Any]) -> None:
    """Train the runs of --sweep for a program. Raises UserError if one of them fails."""
    script = open_script(parser, type(options), has_command=False)
    status = run_sweep(script, options, partial(check_runs, lambda: build), has_signals=False)
    if status:
        raise error_in("--sweep")(f"--sweep ended with status {status}; the lines above say why")


def check_runs(find_build: Callable[[], Callable[[Any], Any]], runs: Sequence[TrainOptions]) -> list[RunSize]:
    """Check the options of runs before any of them is trained. Return what each writes. Imports torch.

    Raises UserError naming the run.
    """
    from library.training.command_line.checks import check
    from library.training.models.preflight import mute_logging

    build, sizes = find_build(), []
    for options in runs:
        try:
            with mute_logging():
                check(options)
                sizes.append(RunSize(0, 0) if options.dataset.only_looks else measure_run(options, build))
        except UserError as error:
            raise error.prefixed(f"--sweep: {options.saving.output_name}: ", "--sweep") from error
    return sizes


def measure_run(options: TrainOptions, build: Callable[[Any], Any]) -> RunSize:
    """Build the adapter of a run on meta models, and return what the run writes. Raises UserError for its options."""
    import torch

    from library.training.models.preflight import preflight
    from library.training.models.requests import RequestedRun
    from library.training.saving.checkpoints import save_dtype

    num_values = preflight(RequestedRun.resolve(options, build(options)), options.run.max_train_steps)
    is_half = options.precision.full_bf16 or options.precision.full_fp16
    dtype = save_dtype(options.saving.save_precision) or (torch.bfloat16 if is_half else torch.float32)
    # Beside the adapter, a state has two values of the optimizer for each of its own.
    return RunSize(num_values * dtype.itemsize, num_values * 3 * 4)
