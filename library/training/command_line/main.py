"""From the command line to the end of the run: what every training script calls."""

import argparse
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any, TypeVar

from library.diffusion.flow import FlowMatching
from library.errors import UserError
from library.options.base import changes
from library.options.train import TrainOptions
from library.protocols import Architecture, LatentSpec
from library.training.command_line.checks import (
    check,
    check_inpainting,
    check_vae_precision,
    check_values,
    report_unused,
)
from library.training.command_line.cli import from_program, parse
from library.training.command_line.console import forgive_write_errors
from library.training.command_line.replaced import refuse_replaced
from library.training.command_line.run_lock import run_locks
from library.training.command_line.show_timesteps import asked_preview, show_timesteps
from library.training.failures.interruption import Interrupted, Interruption
from library.training.reporting.event_stream import EventsOfAll, WarningEvents, warnings_told
from library.training.reporting.log_prefix import speaking_of
from library.training.saving.resume import AlreadyComplete
from library.training.sweep.combinations import shared_and_own

if TYPE_CHECKING:
    from library.data.training_data import TrainingData
    from library.processes import Processes
    from library.training.loop.prepared import Prepared
    from library.training.planning.fit import Fit
    from library.training.sweep_record import SweepRecord

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
) -> int:
    """Train as the command line says. Gives the exit status: 0 done or stopped and saved, 1 ended by an error (2 is
    argparse's own).

    With `latents`, which decide the sizes of buckets, --debug_dataset works without a base model. A flow model also
    gives its `objective`, for --show_timesteps.
    """
    forgive_write_errors()
    interruption = Interruption()
    interruption.install()
    args = parse(parser, argv)
    try:
        options = options_type.from_args(args)
        command = sys.argv[1:] if argv is None else argv
        is_over = train_as_asked(options, build, latents, objective, interruption, command)
        if options.faults.exit_status_on_stop and not is_over:
            return interruption.exit_status
    except AlreadyComplete as error:
        logger.info("%s", error)
    except Interrupted as error:
        logger.warning("%s received before the first step: nothing was trained, nothing to save", error)
        return interruption.exit_status
    except Exception as error:
        report_error(error)
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
    """Train as a program asks that imports a script: signals stay with the program, and what would end a run as a line
    on the screen is raised, such as UserError. A run that has nothing left to do returns. `trainer` is what the program
    calls, and may have replaced methods of.
    """
    from accelerate.state import AcceleratorState

    refuse_replaced(trainer)
    AcceleratorState._reset_state()  # a program may train twice, with another precision
    options = options_type.from_args(from_program(parser, args))
    try:
        train_as_asked(options, build, latents, objective, Interruption())
    except AlreadyComplete as error:
        logger.info("%s", error)


def train_as_asked(
    options: OptionsT,
    build: Callable[[OptionsT], Architecture],
    latents: LatentSpec | None,
    objective: Callable[[OptionsT], FlowMatching] | None,
    interruption: Interruption,
    command: Sequence[str] | None = None,
) -> bool:
    """Check the options, then train, or show noise levels or the data set; gives whether the run came to its end."""
    if latents is not None and objective is not None and (asked := asked_preview(options)) is not None:
        check_values(options)
        show_timesteps(asked, options, objective(options), latents.downscale)
        return True
    with warnings_told() as warnings:
        check(options)
        if latents is not None and options.dataset.audit_only:
            from library.training.command_line.audit_only import audit_only

            audit_only(options, latents)
            return True
        if latents is not None and options.dataset.debug_dataset and not options.model.pretrained_model_name_or_path:
            show_dataset(options, latents)
            return True
        return train_alone(options, build, interruption, command, warnings)


def train_alone(
    options: OptionsT,
    build: Callable[[OptionsT], Architecture],
    interruption: Interruption,
    command: Sequence[str] | None,
    warnings: WarningEvents,
) -> bool:
    """Train while no other run writes the same files, and tell of it; gives whether the run came to its end."""
    from library.installed import NEEDED_BY_ALL, check_installed
    from library.training.models.cuda_kernels import cuda_kernels
    from library.training.run.deterministic import deterministic
    from library.training.run.run_events import told

    check_installed("adapters", NEEDED_BY_ALL)
    options, adapters = shared_and_own(options)
    for label, own in adapters.items() if options.sweep.sweep else ():
        with speaking_of(label):
            check(own)
    with (
        run_locks([options, *adapters.values()]),
        told(adapters.values(), command, warnings) as events,
        cuda_kernels(options.kernels),
        deterministic(options.faults.deterministic),
    ):
        is_over = train_network(options, build, interruption, events, adapters)
        events.end("finished" if is_over else "stopped")
        return is_over


def show_dataset(options: TrainOptions, latents: LatentSpec) -> None:
    """Show the batches of the first epoch where no base model is named."""
    from library.data.debug_dataset import show_batches
    from library.training.command_line.audit_only import audited

    logger.info("no base model is named, so captions are not counted in tokens: --pretrained_model_name_or_path does")
    show_batches(audited(options, latents))


def train_network(
    options: OptionsT,
    build: Callable[[OptionsT], Architecture],
    interruption: Interruption,
    events: EventsOfAll,
    adapters: Mapping[str, OptionsT],
) -> bool:
    """Open the base model and find the other processes, then train among them; gives what `train_among` does."""
    from library.collector import importing
    from library.hidden_libraries import BITSANDBYTES, find_neither, hidden
    from library.memory.offload.shared import IN_MEMORY
    from library.processes import of_accelerator
    from library.temporary_folders import delete_abandoned_folders
    from library.training.models.opening import open_accelerator
    from library.training.run.dry_run import without_writing
    from library.training.run.shard_base_checks import as_launched, settled_sharding
    from networks.core.protocol import open_network_module

    asked, options = options, as_launched(options)
    if options.faults.dry_run:
        options = without_writing(options)
    with importing("tokenizers"):
        find_neither()
        with hidden(BITSANDBYTES):  # a misspelt module ends the run before the base model and the images are opened
            for module in filter(None, dict.fromkeys(own.network.network_module for own in adapters.values())):
                open_network_module(module)
        arch = build(options)
    report_unused(options, arch.ignores)
    check_inpainting(options, arch.inpaints)
    check_vae_precision(options, arch.vae_overflows_in_fp16)
    accelerator = open_accelerator(options)
    processes = of_accelerator(accelerator)
    if processes.is_local_main:
        delete_abandoned_folders((IN_MEMORY, gettempdir()))
    with processes.taking_part(Interrupted):
        options = settled_sharding(options, processes)
        return train_among(processes, accelerator, asked, options, build, arch, interruption, events, adapters)


def train_among(
    processes: "Processes",
    accelerator: Any,
    asked: OptionsT,
    options: OptionsT,
    build: Callable[[OptionsT], Architecture],
    arch: Architecture,
    interruption: Interruption,
    events: EventsOfAll,
    adapters: Mapping[str, OptionsT],
) -> bool:
    """Set the run up and train it; gives whether that came to its end, and was not stopped on the way.

    `options` are what became of those that were `asked` for by what was found so far.
    """
    from library.data.debug_dataset import show_batches
    from library.hidden_libraries import BITSANDBYTES, hidden
    from library.training.failures.out_of_memory import explained
    from library.training.models import opening
    from library.training.reporting.events import Audit
    from library.training.run import runs
    from library.training.run.dry_run import try_largest_batch
    from library.training.run.prepare import prepare
    from library.training.run.selftest import test_itself
    from library.training.saving.hub import check_repository
    from library.training.saving.resume import with_batches_of_state, with_rates_of_state
    from library.training.sweep.states import find_states
    from library.training.sweep_record import SweepRecord

    found = find_states(options, adapters, processes)
    options = with_rates_of_state(options, found.by_label.get(""))
    options = with_batches_of_state(options, found.of_run, processes.count)
    if processes.is_main:
        check_repository(options.hub)
    seed = opening.choose_seed(options.run.seed, processes, found.of_run)
    data = opening.open_training_data(options, arch, seed, processes.count)
    if options.dataset.debug_dataset:
        show_batches(data)
        return True
    if events.is_on:
        events.emit(Audit(**data.facts()))
    options, arch, fitted = fitted_to_memory(asked, options, build, arch, data, processes, adapters, events)
    largest = None
    if options.faults.dry_run:
        data, largest = data.limited_to_largest_batch()
    with (
        events.stage("loading"),
        explained("loading the models and caching", options, accelerator.device, ""),
        hidden(BITSANDBYTES),
    ):
        sweep = found.record or (SweepRecord(seed) if options.sweep.sweep else None)
        settled = changes(asked, options)
        wanted = [
            runs.wanted(own.with_values(settled), seed, found.by_label.get(label), each, label)
            for (label, own), each in zip(adapters.items(), events.each, strict=True)
            if sweep is None or label not in sweep.ended
        ]
        prepared = prepare(options, arch, seed, data, accelerator, processes, wanted, sweep)
    first = prepared[0]
    if options.faults.selftest:
        with explained("testing itself (--selftest)", options, accelerator.device, ""):
            test_itself(first.run)
    if largest is not None:
        try_largest_batch([one.run for one in prepared], first.writer, largest)
        return True
    is_over = train_prepared(prepared, events, interruption, processes, fitted)
    if processes.is_main and sweep is not None and is_over:
        rank_adapters(options, prepared, sweep)
    return is_over


def fitted_to_memory(
    asked: OptionsT,
    options: OptionsT,
    build: Callable[[OptionsT], Architecture],
    arch: Architecture,
    data: "TrainingData",
    processes: "Processes",
    adapters: Mapping[str, OptionsT],
    events: EventsOfAll,
) -> "tuple[OptionsT, Architecture, Fit | None]":
    """The options with what --fit chooses, and the base model built for them; without it, both as they are."""
    if options.fit.fit is None:
        return options, arch, None
    from library.data.plan.data_plan import DataPlan
    from library.training.planning.fit_run import fit_run
    from library.training.reporting.events import Planned

    assert isinstance(data, DataPlan), "--dataset_class refuses --fit"
    together = [own.with_values(changes(asked, options)) for own in adapters.values()]
    options, arch, fitted = fit_run(options, build, arch, data, processes, together)
    if (chosen := fitted.choice.chosen) is not None:
        for each in events.each:
            each.planned = Planned(chosen.device_bytes, chosen.tensor_bytes, chosen.seconds)
    return options, arch, fitted


def train_prepared(
    prepared: "Sequence[Prepared]",
    events: EventsOfAll,
    interruption: Interruption,
    processes: "Processes",
    fitted: "Fit | None",
) -> bool:
    """Train, and say what was trained; gives whether all adapters came to their end.

    What was trained so far is saved if an error or a number that is not finite ends it.
    """
    from library.training.failures.failure import saved_on_error
    from library.training.failures.nonfinite import last_good_saved
    from library.training.loop.loop import train
    from library.training.planning.advice import ways_out
    from library.training.planning.correction import MemoryWatch
    from library.training.sweep.ranking import clearly_worse

    interruption.defer()
    first = prepared[0]
    started, first_step = time.monotonic(), first.progress.step
    try:
        with ExitStack() as stack:
            stack.enter_context(events.stage("training"))
            for one in prepared:
                stack.enter_context(last_good_saved(one.writer))
                stack.enter_context(saved_on_error(one.writer, one.progress, one.run.plan))
            stack.enter_context(processes.failures_told())
            train(prepared, interruption, MemoryWatch.build(first.run, fitted), ways_out, clearly_worse)
    finally:
        first.charts.close()
    if processes.is_main and (speed := first.run.times.summary()) is not None:
        logger.info("%s", speed)
        for each in events.each:
            each.summary = speed
    are_over = [has_come_to_end(one) for one in prepared]
    for one in (one for one, is_over in zip(prepared, are_over, strict=True) if processes.is_main and is_over):
        with speaking_of(one.run.label):
            tell_end(one, first_step, time.monotonic() - started)
    return all(are_over)


def rank_adapters(options: TrainOptions, prepared: Sequence["Prepared"], sweep: "SweepRecord") -> None:
    """Say which adapters of a sweep are better than others, and write the page that shows it."""
    from library.training.saving.checkpoints import Names
    from library.training.sweep.ranking import rank, tell_ranking
    from library.training.sweep.standing import standing_of

    names = Names.build(options.saving)
    page = None if options.reports.no_report else names.of_sweep()
    title = f"Sweep of {options.saving.output_name or names.folder.name}"
    tell_ranking(rank(standing_of(prepared, sweep)), title, page)


def has_come_to_end(prepared: "Prepared") -> bool:
    """Whether an adapter was not stopped on the way."""
    progress = prepared.progress
    return progress.step >= prepared.run.plan.max_train_steps or bool(progress.ended)


def tell_end(prepared: "Prepared", first_step: int, seconds: float) -> None:
    """Say what a complete run has trained, in `seconds` from `first_step` on, and which file is suggested."""
    from library.training.evaluation.choosing import told_choice
    from library.training.reporting.console_lines import finished_line
    from library.training.saving.saved_files import files_of_run
    from library.training.sweep_record import NOT_FINITE

    run, names, network = prepared.run, prepared.writer.names, prepared.run.options.network
    if prepared.progress.ended == NOT_FINITE:  # which was told
        run.events.end("error", f"it ended alone: {NOT_FINITE}")
        return
    choice = prepared.validation.choose(files_of_run(names))
    if choice is not None:
        run.events.emit(choice)
        logger.info("%s", told_choice(choice))
    rank = f" of rank {network.network_dim}" if network.network_dim else ""
    what = f"{network.network_module}{rank} on {run.context.arch.name}"
    best, run.events.file = prepared.validation.best, str(names.of_end())
    num_steps = prepared.progress.step - first_step
    logger.info("%s", finished_line(what, num_steps, seconds, names.of_end(), best, names.of_best()))


OUR_FAULT = (
    "this is a fault of the program, not of your settings: please report it with the lines above and the command line"
)


def report_error(error: Exception) -> None:
    """Show what ended a run; what was saved is told last.

    What the user can put right is a sentence, and so is what the operating system refuses. Anything else is a fault of
    ours and keeps its traceback.
    """
    from library.training.failures.failure import StoppedByError

    if isinstance(error, StoppedByError) and isinstance(error.__cause__, Exception):
        report_error(error.__cause__)
        logger.error("%s", error)
    elif isinstance(error, UserError) or is_from_system(error):
        logger.error("%s", error)
        logger.debug("where it was found:", exc_info=error)
    else:
        logger.error("%s: %s", type(error).__name__, error, exc_info=error)
        logger.error("%s", OUR_FAULT)


def is_from_system(error: Exception) -> bool:
    """Whether the operating system refused something for a file: a full disk, missing rights."""
    return isinstance(error, OSError) and error.errno is not None and error.filename is not None
