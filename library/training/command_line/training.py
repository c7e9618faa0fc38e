"""A training run from checked options to its end, in stages."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from tempfile import gettempdir
from typing import Any, Generic, TypeVar

import torch

from library.collector import freeze_imports
from library.data.debug_dataset import show_batches
from library.data.training_data import TrainingData
from library.determinism import deterministic, explain_nondeterminism
from library.errors import UserError
from library.hidden_libraries import BITSANDBYTES, hide_library, import_diffusers_hiding_libraries
from library.installed import NEEDED_BY_ALL, check_gpu_is_used, check_installed
from library.launcher import launched_rank
from library.memory.offload.shared import IN_MEMORY
from library.options.output.saving import SavingOptions
from library.options.train import TrainOptions
from library.processes import Processes, from_accelerator
from library.protocols import Architecture
from library.temporary_folders import delete_abandoned_folders
from library.training.command_line.checks import check, report_unused, warn_of_fp16_vae
from library.training.command_line.pairs import show_pairs
from library.training.command_line.run_lock import run_locks
from library.training.evaluation.choosing import format_choice
from library.training.failures.failure import save_on_error
from library.training.failures.interruption import Interrupted, Interruption
from library.training.failures.nonfinite import save_last_good
from library.training.failures.out_of_memory import explain_out_of_memory
from library.training.loop.adapter_run import PreparedRun
from library.training.loop.loop import train
from library.training.models import opening
from library.training.models.cuda_kernels import cuda_kernels
from library.training.models.opening import open_accelerator
from library.training.planning.advice import memory_hints
from library.training.planning.correction import MemoryWatch
from library.training.planning.fit import Fit
from library.training.planning.fit_run import fit_run
from library.training.report_page.page import TITLES
from library.training.reporting.console_lines import format_finished
from library.training.reporting.event_stream import EventsOfAll, WarningEvents
from library.training.reporting.events import Audit, Planned
from library.training.reporting.log_prefix import log_prefix
from library.training.run import runs
from library.training.run.dry_run import DRY_RUN_VALUES, try_largest_batch
from library.training.run.prepare import prepare
from library.training.run.run_events import open_events
from library.training.run.selftest import test_itself
from library.training.run.shard_base_checks import resolve_launched_values, sharding_values
from library.training.saving.checkpoints import Names
from library.training.saving.hub import check_repository
from library.training.saving.resume import alpha_of_state, batches_of_state, rates_of_state
from library.training.saving.saved_files import files_of_run
from library.training.saving.state import StateManifest
from library.training.sweep.combinations import expand_combinations, split_options
from library.training.sweep.ranking import add_runs, clearly_worse, collect_standing, log_ranking, rank
from library.training.sweep.states import FoundStates, find_states
from library.training.sweep_record import NOT_FINITE, SweepRecord
from networks.core.protocol import open_network_module

logger = logging.getLogger(__name__)
OptionsT = TypeVar("OptionsT", bound=TrainOptions)


@dataclass(frozen=True)
class ResolvedOptions(Generic[OptionsT]):
    """The options of what all adapters share, and those of each adapter.

    The launcher, the processes, the states and the planner override values on the way, each in both.
    """

    shared: OptionsT  # of the base model, the data and the loop
    adapters: Mapping[str, OptionsT]  # by label; one of label "" without a sweep

    def with_values(self, values: Mapping[str, Any]) -> "ResolvedOptions[OptionsT]":
        """Override options by name."""
        adapters = {label: options.with_values(values) for label, options in self.adapters.items()}
        return ResolvedOptions(self.shared.with_values(values), adapters)


@dataclass(frozen=True)
class ResolvedRun(Generic[OptionsT]):
    """A run before any model is loaded."""

    options: ResolvedOptions[OptionsT]
    arch: Architecture
    seed: int  # shared by all adapters
    data: TrainingData
    states: FoundStates  # that it resumes from
    fit: Fit | None = None  # None without --fit


def train_alone(
    options: OptionsT,
    build: Callable[[OptionsT], Architecture],
    interruption: Interruption,
    command: Sequence[str] | None,
    warnings: WarningEvents,
) -> bool:
    """Train while no other run writes the same files, and emit events. Return True if the run is complete."""
    check_installed("adapters", NEEDED_BY_ALL)
    check_gpu_is_used(torch)
    shared, adapters = split_options(options)
    for label, adapter_options in adapters.items() if shared.sweep.sweep else ():
        with log_prefix(label):
            check(adapter_options)
    # A dry run and a look at the dataset write nothing, so they may run next to a run of the same name.
    writes = not (shared.faults.dry_run or shared.dataset.debug_dataset)
    with (
        run_locks([run_options.saving for run_options in (shared, *adapters.values())] if writes else []),
        open_events(adapters.values(), command, warnings) as events,
        cuda_kernels(shared.kernels),
        deterministic(shared.faults.deterministic),
    ):
        is_over = train_network(ResolvedOptions(shared, adapters), build, interruption, events)
        events.end("finished" if is_over else "stopped")
    if shared.sweep.sweep and not shared.reports.no_report and launched_rank() == 0:
        # The page reads the adapters' reports, which are complete once the events have ended.
        complete_sweep_page(options, adapters)
    return is_over


def train_network(
    options: ResolvedOptions[OptionsT],
    build: Callable[[OptionsT], Architecture],
    interruption: Interruption,
    events: EventsOfAll,
) -> bool:
    """Build the architecture, initialize distributed processes, resolve the options and train. Return True if the
    run is complete, False if it was stopped."""
    values = resolve_launched_values(options.shared.distributed.shard_base)
    options = options.with_values(values | DRY_RUN_VALUES if options.shared.faults.dry_run else values)
    arch = open_architecture(options, build)
    accelerator = open_accelerator(
        options.shared.precision.mixed_precision, options.shared.trackers, options.shared.distributed.ddp_timeout
    )
    processes = from_accelerator(accelerator)
    if processes.is_local_main:
        # Killed runs may leave shared weights in memory and latents on disk, tens of gigabytes for a large model.
        delete_abandoned_folders((IN_MEMORY, gettempdir()))
    with processes.taking_part(Interrupted):
        run = resolve_run(options, arch, processes)
        if run.options.shared.dataset.debug_dataset:
            show_batches(run.data)
            return True
        if events.is_on:
            events.emit(Audit(**run.data.facts(), pairs=show_pairs(run.data.image_plan)))
        return train_resolved(fit_to_memory(run, processes, events), accelerator, processes, interruption, events)


def open_architecture(options: ResolvedOptions[OptionsT], build: Callable[[OptionsT], Architecture]) -> Architecture:
    """Build the architecture and check the options against it.

    Network modules are imported first, so that a misspelt one is reported before files are read.
    """
    with freeze_imports("tokenizers"):
        import_diffusers_hiding_libraries()
        with hide_library(BITSANDBYTES):
            for module in filter(
                None, dict.fromkeys(adapter.network.network_module for adapter in options.adapters.values())
            ):
                open_network_module(module)
        arch = build(options.shared)
    report_unused(options.shared, arch.ignores)
    if options.shared.dataset.train_inpainting and not arch.inpaints:
        raise UserError("--train_inpainting: this base model takes no masks; leave it out")
    if arch.vae_overflows_in_fp16:
        warn_of_fp16_vae(options.shared.model, options.shared.precision.mixed_precision)
    return arch


def resolve_run(options: ResolvedOptions[OptionsT], arch: Architecture, processes: Processes) -> ResolvedRun[OptionsT]:
    """Find the states to resume from, resolve the options that depend on them and on the processes, and open the data.

    States are read before the data, because a resumed run keeps its state's seed, which sets the order of the data.
    """
    shared = options.shared
    sharding = sharding_values(shared, processes)
    states = find_states(shared, options.adapters, processes)
    batches = batches_of_state(shared.run.gradient_accumulation_steps, states.of_run, processes.count)
    options = keep_values_of_states(options, states.by_label).with_values(sharding | batches)
    if processes.is_main:
        check_repository(options.shared.hub)
    seed = opening.choose_seed(options.shared.run.seed, processes, states.of_run)
    data = opening.open_training_data(options.shared, arch, seed, processes.count)
    return ResolvedRun(options, arch, seed, data, states)


def keep_values_of_states(
    options: ResolvedOptions[OptionsT], states: Mapping[str, StateManifest]
) -> ResolvedOptions[OptionsT]:
    """Return the options with the learning rates and the alpha that each adapter keeps from its state."""
    kept = {}
    for label, adapter_options in options.adapters.items():
        with log_prefix(label):
            state = states.get(label)
            kept[label] = rates_of_state(adapter_options, state)
            kept[label] |= alpha_of_state(adapter_options.network.network_alpha, state)
    adapters = {label: options.adapters[label].with_values(values) for label, values in kept.items()}
    return ResolvedOptions(options.shared.with_values(next(iter(kept.values()))), adapters)


def fit_to_memory(run: ResolvedRun[OptionsT], processes: Processes, events: EventsOfAll) -> ResolvedRun[OptionsT]:
    """Apply the options that the memory planner chooses for the largest batch."""
    if run.options.shared.fit.fit is None:
        return run
    sizes = run.data.sizes
    assert sizes is not None, "options refuse to plan the memory of a user's class"
    fit = fit_run(run.options.shared, run.arch, sizes, processes, [*run.options.adapters.values()])
    chosen = fit.choice.chosen
    assert chosen is not None, "fit_run raises where nothing fits"
    for adapter_events in events.each:
        adapter_events.planned = Planned(chosen.device_bytes, chosen.tensor_bytes, chosen.seconds)
    return replace(run, options=run.options.with_values(fit.values()), fit=fit)


def train_resolved(
    run: ResolvedRun[OptionsT],
    accelerator: Any,
    processes: Processes,
    interruption: Interruption,
    events: EventsOfAll,
) -> bool:
    """Load the models, attach the adapters, and train; or run the dry run or the self-test."""
    options, states, data, largest = run.options.shared, run.states, run.data, None
    if options.faults.dry_run:
        data, largest = data.limited_to_largest_batch()
    sweep = states.record or (SweepRecord(run.seed) if options.sweep.sweep else None)
    with (
        events.stage("loading"),
        explain_out_of_memory("loading the models and caching", options, accelerator.device, ""),
        hide_library(BITSANDBYTES),
    ):
        # An adapter that a sweep ended before a resume stays ended.
        requests = [
            runs.request_adapter(adapter_options, run.seed, states.by_label.get(label), adapter_events, label)
            for (label, adapter_options), adapter_events in zip(run.options.adapters.items(), events.each, strict=True)
            if sweep is None or label not in sweep.ended
        ]
        prepared = prepare(options, run.arch, run.seed, data, accelerator, processes, requests, sweep)
    first = prepared[0]
    if options.faults.selftest:
        with explain_out_of_memory("testing itself (--selftest)", options, accelerator.device, ""):
            test_itself(first.run)
    if largest is not None:
        try_largest_batch([adapter.run for adapter in prepared], first.writer, largest)
        return True
    is_over = train_prepared(prepared, events, interruption, processes, run.fit)
    if processes.is_main and sweep is not None and is_over:
        rank_adapters(options.saving, prepared, sweep, writes_page=not options.reports.no_report)
    return is_over


def train_prepared(
    prepared: Sequence[PreparedRun],
    events: EventsOfAll,
    interruption: Interruption,
    processes: Processes,
    fitted: Fit | None,
) -> bool:
    """Train and log a summary. Return True if all adapters are complete.

    Progress is saved if an error or a non-finite number ends the run.
    """
    # From here on there is progress to save, so a signal ends the run after its step.
    interruption.defer()
    first = prepared[0]
    started, first_step = time.monotonic(), first.progress.step
    try:
        with ExitStack() as stack:
            stack.enter_context(events.stage("training"))
            for adapter in prepared:
                stack.enter_context(save_last_good(adapter.writer))
                stack.enter_context(save_on_error(adapter.writer, adapter.progress, adapter.run.plan))
            stack.enter_context(explain_nondeterminism())
            # Entered last, so that other processes hear of a failure before this one saves.
            stack.enter_context(processes.reporting_failures())
            train(prepared, interruption, MemoryWatch.build(first.run, fitted), memory_hints, clearly_worse)
    finally:
        first.charts.close()
    if processes.is_main and (speed := first.run.times.summary()) is not None:
        logger.info("%s", speed)
        for adapter_events in events.each:
            adapter_events.summary = speed
    last_step = first.run.plan.max_train_steps
    are_over = [adapter.progress.step >= last_step or bool(adapter.progress.ended) for adapter in prepared]
    seconds = time.monotonic() - started
    for adapter in (adapter for adapter, is_over in zip(prepared, are_over, strict=True) if is_over):
        # A sharded weight is gathered by all processes together.
        measures = processes.is_main or adapter.run.context.models.sharded is not None
        change = measure_change(adapter) if measures else None
        if processes.is_main:
            with log_prefix(adapter.run.label):
                log_end(adapter, first_step, seconds, change)
    return all(are_over)


def measure_change(prepared: PreparedRun) -> float | None:
    """Return the size of an adapter's change relative to the base model's weights; None if it cannot be measured."""
    with prepared.writer.saved_weights():
        try:
            return prepared.run.context.network.relative_change()
        except torch.OutOfMemoryError:
            # The run is saved, and a layer's weight in float32 is all that did not fit.
            logger.info("the size of the change is not measured: out of GPU memory; tools/check_lora_weights.py does")
            return None


def rank_adapters(
    saving: SavingOptions, prepared: Sequence[PreparedRun], sweep: SweepRecord, writes_page: bool
) -> None:
    """Log the ranking of a sweep's adapters, and write its page."""
    names = Names.build(saving)
    page = names.of_sweep() if writes_page else None
    title = TITLES["sweep"] + (saving.output_name or names.folder.name)
    log_ranking(rank(collect_standing(prepared, sweep)), title, page)


def complete_sweep_page(options: OptionsT, adapters: Mapping[str, OptionsT]) -> None:
    """Add charts and previews to the page of a finished sweep, once all reports are written."""
    page = Names.build(options.saving).of_sweep()
    if page.exists():
        chosen = {combination.label: combination.chosen for combination in expand_combinations(options)}
        add_runs(
            page,
            chosen,
            {label: Names.build(adapter_options.saving).of_report() for label, adapter_options in adapters.items()},
        )


def log_end(prepared: PreparedRun, first_step: int, seconds: float, change: float | None) -> None:
    """Log what a complete run has trained in `seconds` since `first_step`, its size, and the suggested file."""
    run, names, network = prepared.run, prepared.writer.names, prepared.run.options.network
    if prepared.progress.ended == NOT_FINITE:  # already reported
        run.events.end("error", f"it ended alone: {NOT_FINITE}")
        return
    choice = prepared.validation.choose(files_of_run(names))
    if choice is not None:
        run.events.emit(choice)
        logger.info("%s", format_choice(choice))
    rank = f" of rank {network.network_dim}" if network.network_dim else ""
    trained = f"{network.network_module}{rank} on {run.context.arch.name}"
    relocated = prepared.writer.relocated
    end, best_file = (relocated.get(path, path) for path in (names.of_end(), names.of_best()))
    best, run.events.file = prepared.validation.record.best, str(end)
    num_steps = prepared.progress.step - first_step
    logger.info("%s", format_finished(trained, num_steps, seconds, end, change, best, best_file))
