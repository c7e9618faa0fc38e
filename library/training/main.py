"""From the command line to the end of the run: what every training script calls."""

import argparse
import logging
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from library.architectures.interface import Architecture
from library.options.train import TrainOptions
from library.training.checks import check, check_vae_precision, report_unused
from library.training.cli import parse
from library.training.interruption import Interrupted, Interruption
from library.training.resume import AlreadyComplete
from library.training.run_lock import run_lock

logger = logging.getLogger(__name__)

OptionsT = TypeVar("OptionsT", bound=TrainOptions)

ROOT = Path(__file__).parents[2]


def main(
    parser: argparse.ArgumentParser,
    options_type: type[OptionsT],
    build: Callable[[OptionsT], Architecture],
    argv: Sequence[str] | None = None,
) -> int:
    """Train as the command line says. Gives the exit status: 0 done, 1 stopped by an error (2 is argparse's own)."""
    interruption = Interruption()
    interruption.install()
    args = parse(parser, argv)
    try:
        options = options_type.from_args(args)
        check(options)
        with run_lock(options):
            train_network(options, build, interruption)
    except AlreadyComplete as error:
        logger.info("%s", error)
    except Interrupted as error:
        logger.warning("%s received before the first step: nothing was trained, nothing to save", error)
        return 130 if str(error) == "SIGINT" else 143
    except Exception as error:
        report_error(error)
        return 1
    return 0


def train_network(options: OptionsT, build: Callable[[OptionsT], Architecture], interruption: Interruption) -> None:
    """Set the run up and train it."""
    from library.data.dataset import NoDataFound
    from library.data.debug import show_batches
    from library.processes import of_accelerator
    from library.training import setup
    from library.training.dry_run import try_largest_batch, without_writing
    from library.training.hub import check_repository
    from library.training.out_of_memory import explained
    from library.training.resume import find_state, with_rates_of_state

    if options.faults.dry_run:
        options = without_writing(options)
    arch = build(options)
    report_unused(options, arch.ignores)
    check_vae_precision(options, arch.vae_overflows_in_fp16)
    accelerator = setup.open_accelerator(options)
    processes = of_accelerator(accelerator)
    facts = find_state(options, processes)
    options = with_rates_of_state(options, facts)
    if processes.is_main:
        check_repository(options.hub)
    seed = setup.choose_seed(options.run.seed, processes, facts)
    try:
        training_set = setup.open_training_set(options, arch, seed, processes.count)
    except NoDataFound as error:
        logger.error("No data found: %s", error)
        return
    if options.dataset.debug_dataset:
        show_batches(training_set)
        return
    largest = training_set.limit_to_largest_batch() if options.faults.dry_run else None
    with explained("loading the models and caching", options, accelerator.device, ""):
        prepared = setup.prepare(options, arch, seed, training_set, accelerator, processes, facts)
    if largest is not None:
        try_largest_batch(prepared.run, prepared.writer, largest)
        return
    from library.training.failure import saved_on_error
    from library.training.loop import train
    from library.training.nonfinite import last_good_saved

    interruption.defer()
    try:
        with (
            last_good_saved(prepared.writer),
            saved_on_error(prepared.writer, prepared.progress, prepared.run.plan),
        ):
            train(
                prepared.run,
                prepared.progress,
                prepared.writer,
                prepared.charts,
                prepared.previews,
                prepared.validation,
                interruption,
                prepared.resumed,
            )
    finally:
        prepared.charts.close()


def report_error(error: Exception) -> None:
    """A message of ours stands alone; anything unforeseen comes with its traceback. What was saved is told last."""
    from library.training.failure import StoppedByError

    if isinstance(error, StoppedByError) and isinstance(error.__cause__, Exception):
        report_error(error.__cause__)
        logger.error("%s", error)
    elif is_foreseen(error):
        logger.error("%s", error)
        logger.debug("where it was found:", exc_info=error)
    else:
        logger.error("%s: %s", type(error).__name__, error, exc_info=error)


def is_foreseen(error: BaseException) -> bool:
    """Whether this is an error that our own code raises with a message for the user."""
    frames = traceback.extract_tb(error.__traceback__)
    is_ours = bool(frames) and Path(frames[-1].filename).is_relative_to(ROOT) and ".venv" not in frames[-1].filename
    return is_ours and isinstance(error, (ValueError, OSError))
