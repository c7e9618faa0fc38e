"""The entry point of every training script."""

import argparse
import logging
import sys
from bdb import BdbQuit
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from library.base.errors import UserError
from library.diffusion.flow import FlowMatching
from library.environment.packages import explain_fault
from library.options.train import TrainOptions
from library.protocols import Architecture, LatentSpec
from library.training.command_line.cli import CommandLine, from_program, log_user_error, read_command_line
from library.training.command_line.console import forgive_write_errors
from library.training.command_line.replaced import refuse_replaced
from library.training.command_line.sweeps import sweep_by_command, sweep_for_program
from library.training.command_line.training import train_as_asked
from library.training.failures.failure import StoppedByError
from library.training.failures.interruption import Interrupted, Interruption
from library.training.failures.out_of_memory import describe_out_of_memory, is_out_of_memory
from library.training.reporting.event_stream import Sink
from library.training.saving.resume import AlreadyComplete

logger = logging.getLogger(__name__)

OptionsT = TypeVar("OptionsT", bound=TrainOptions)


def main(
    parser: argparse.ArgumentParser,
    options_type: type[OptionsT],
    build: Callable[[OptionsT], Architecture],
    argv: Sequence[str] | None = None,
    *,
    latents: LatentSpec | None = None,
    objective: Callable[[OptionsT], FlowMatching] | None = None,
    command_line: CommandLine | None = None,
    sinks: Sequence[Sink] = (),
) -> int:
    """Train as the command line says. Return the exit status: 0 finished or stopped and saved, 1 error (2 is
    argparse's).

    With `latents`, which determine bucket sizes, batches can be shown without a base model. A flow model also passes
    its `objective`, to show its timesteps. `command_line` is what `check_words` has already read. `sinks` take the
    events of the run too.
    """
    # First of all, because a closed pipe or a full disk behind the output must not end a run.
    forgive_write_errors()
    command_line = command_line or read_command_line(parser, argv)
    if command_line.args.sweep:
        return sweep_by_command(command_line, options_type, lambda: build)
    interruption = Interruption()
    interruption.install()
    args = command_line.start_log()
    try:
        options = options_type.from_args(args)
        command = sys.argv[1:] if argv is None else argv
        is_over = train_as_asked(options, build, latents, objective, interruption, command, sinks)
        if options.diagnostics.exit_status_on_stop and not is_over:
            return interruption.exit_status
    except AlreadyComplete as error:
        logger.info("%s", error)
    except Interrupted as error:
        logger.warning("%s received before the first step: nothing was trained, nothing to save", error)
        return interruption.exit_status
    except Exception as error:
        report_error(error, command_line)
        return 1
    finally:
        interruption.disarm()
    return 0


def train_for_program(
    trainer: object,
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    options_type: type[OptionsT],
    build: Callable[[OptionsT], Architecture],
    latents: LatentSpec,
    objective: Callable[[OptionsT], FlowMatching] | None = None,
) -> None:
    """Train for a program that imports a script: signals stay with the program, and errors such as UserError are
    raised instead of printed. A complete run returns at once. `trainer` is the object that the program calls and
    whose methods it may have replaced."""
    from accelerate.state import AcceleratorState

    refuse_replaced(trainer)
    AcceleratorState._reset_state()  # a program may train twice with different precisions
    options = options_type.from_args(from_program(parser, args))
    if options.sweep.sweep:
        sweep_for_program(parser, options, build)
        return
    try:
        train_as_asked(options, build, latents, objective, Interruption())
    except AlreadyComplete as error:
        logger.info("%s", error)


OUR_FAULT = (
    "this is a bug, not a problem with your settings: please report it with the lines above and the command line"
)


def report_error(error: Exception, command_line: CommandLine | None = None) -> None:
    """Print the error that ended a command, and what was saved; as JSON too, if the command line asks for it."""
    is_wrapped = isinstance(error, StoppedByError) and isinstance(error.__cause__, Exception)
    cause: Any = error.__cause__ if is_wrapped else error
    if not is_out_of_memory(cause):
        cause = explain_fault(cause)
    log_error(cause, command_line)
    if is_wrapped:
        logger.error("%s", error)
    if command_line is not None:
        command_line.print_error(cause)


def log_error(error: Exception, command_line: CommandLine | None) -> None:
    """Log an error.

    User errors, errors of the operating system, memory that ran out and a debugger's quit are printed as sentences;
    anything else is a bug and keeps its traceback.
    """
    # A full disk or missing rights: the operating system refused something for a file.
    is_from_system = isinstance(error, OSError) and error.errno is not None and error.filename is not None
    if isinstance(error, BdbQuit):
        logger.error("the debugger ended the run")
    elif is_out_of_memory(error):
        logger.error("%s", describe_out_of_memory(error))
        logger.debug("where it was found:", exc_info=error)
    elif isinstance(error, UserError) or is_from_system:
        log_user_error(error, command_line)
    else:
        logger.error("%s: %s", type(error).__name__, error, exc_info=error)
        logger.error("%s", OUR_FAULT)
