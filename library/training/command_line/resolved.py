"""A run before any model is loaded: every value that follows from the options is resolved here, once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import Any, Generic, TypeVar

import torch

from library.collector import freeze_imports
from library.data.training_data import TrainingData
from library.errors import UserError
from library.hidden_libraries import BITSANDBYTES, hide_library, import_diffusers_hiding_libraries
from library.installed import NEEDED_BY_ALL, check_gpu_is_used, check_installed
from library.memory.offload.shared import IN_MEMORY
from library.options.train import TrainOptions
from library.processes import Processes
from library.protocols import Architecture
from library.temporary_folders import delete_abandoned_folders
from library.training.command_line.checks import check, report_unused, warn_of_fp16_vae
from library.training.command_line.pairs import show_pairs
from library.training.command_line.run_lock import run_locks
from library.training.failures.out_of_memory import explain_out_of_memory
from library.training.loop.loop import MemoryHints
from library.training.models import opening
from library.training.models.requests import AdapterRequest, RequestedRun
from library.training.models.text_caching import TextPlan
from library.training.models.weight_formats import BaseFormats
from library.training.planning.advice import memory_hints
from library.training.planning.fit import Fit
from library.training.planning.fit_run import fit_run
from library.training.reporting.event_stream import EventsOfAll, WarningEvents
from library.training.reporting.events import Audit, Planned
from library.training.reporting.log_prefix import log_prefix
from library.training.run.dry_run import DRY_RUN_VALUES
from library.training.run.run_events import open_events
from library.training.run.shard_base_checks import resolve_launched_values, sharding_values
from library.training.saving.hub import check_repository
from library.training.saving.names import Names
from library.training.saving.resume import alpha_of_state, batches_of_state, rates_of_state
from library.training.saving.state import StateManifest
from library.training.sweep.combinations import split_options
from library.training.sweep.states import find_states
from library.training.sweep_record import SweepRecord
from networks.core.protocol import NetworkModule, open_network_module

OptionsT = TypeVar("OptionsT", bound=TrainOptions)


@dataclass(frozen=True)
class ResolvedOptions(Generic[OptionsT]):
    """The options of what all adapters share, and those of each adapter.

    The launcher, the processes, the states and the planner override values on the way, each in both.
    """

    shared: OptionsT  # of the base model, the data and the loop
    adapters: Mapping[str, OptionsT]  # by label; one of label "" without a sweep
    names: Mapping[str, Names | None] = field(default_factory=dict)  # of each adapter's files; None without a folder
    page: Path | None = None  # of a sweep

    def with_values(self, values: Mapping[str, Any]) -> "ResolvedOptions[OptionsT]":
        """Override options by name."""
        return self.with_each(values, dict.fromkeys(self.adapters, values))

    def with_each(
        self, values: Mapping[str, Any], by_label: Mapping[str, Mapping[str, Any]]
    ) -> "ResolvedOptions[OptionsT]":
        """Override the shared options, and those of each adapter."""
        adapters = {label: options.with_values(by_label[label]) for label, options in self.adapters.items()}
        return replace(self, shared=self.shared.with_values(values), adapters=adapters)

    @property
    def writes(self) -> bool:
        """False for a dry run and a look at the dataset."""
        return not (self.shared.diagnostics.dry_run or self.shared.dataset.debug_dataset)


@dataclass(frozen=True)
class ResolvedRun:
    """A run whose data is open."""

    requested: RequestedRun
    seed: int  # shared by all adapters
    data: TrainingData
    sweep: SweepRecord | None  # None without a sweep
    fit: Fit | None = None  # None without --fit

    @contextmanager
    def loading(self, events: EventsOfAll, device: torch.device) -> Iterator[None]:
        """Explain in the block what the run lacks while models are loaded and data is encoded."""
        doing = "loading the models and caching"
        with (
            events.stage("loading"),
            explain_out_of_memory(doing, self.requested.options, device, ""),
            hide_library(BITSANDBYTES),
        ):
            yield

    @property
    def memory_hints(self) -> MemoryHints:
        return partial(memory_hints, self.requested)


@contextmanager
def holding_outputs(
    options: ResolvedOptions[OptionsT], command: Sequence[str] | None, warnings: WarningEvents
) -> Iterator[EventsOfAll]:
    """Open the event streams, and keep other runs from writing the same files inside the block."""
    everything = (options.shared, *options.adapters.values()) if options.writes else ()
    resumes = bool(options.shared.state.resume or options.shared.state.autoresume)
    adapters = [
        (o, o.reports, options.names[label] if options.writes else None) for label, o in options.adapters.items()
    ]
    with run_locks(o.saving for o in everything), open_events(adapters, resumes, command, warnings) as events:
        yield events


def split_run(options: OptionsT) -> ResolvedOptions[OptionsT]:
    """Check each adapter's options, and name its files."""
    check_installed("adapters", NEEDED_BY_ALL)
    check_gpu_is_used(torch)
    shared, adapters = split_options(options)
    for label, adapter_options in adapters.items() if shared.sweep.sweep else ():
        with log_prefix(label):
            check(adapter_options)
    names = {label: Names.build(o.saving) if o.saving.output_dir else None for label, o in adapters.items()}
    has_page = shared.sweep.sweep and shared.saving.output_dir and not shared.reports.no_report
    return ResolvedOptions(shared, adapters, names, Names.build(shared.saving).of_sweep() if has_page else None)


def open_base(
    options: ResolvedOptions[OptionsT], build: Callable[[OptionsT], Architecture]
) -> tuple[ResolvedOptions[OptionsT], dict[str, NetworkModule], Architecture]:
    """Apply what the launcher sets, import each adapter's network module, build the architecture and check the options
    against it.

    Network modules are imported first, so that a misspelt one is reported before files are read.
    """
    declared = type(options.shared).declarations()["shard_base"]
    refusal = None if options.shared.concepts is None else declared.refused_by_leco
    values = resolve_launched_values(options.shared.distributed.shard_base, refusal)
    options = options.with_values(values | DRY_RUN_VALUES if options.shared.diagnostics.dry_run else values)
    with freeze_imports("tokenizers"):
        import_diffusers_hiding_libraries()
        with hide_library(BITSANDBYTES):
            # A look at the data may name none.
            names = {label: own.network.network_module for label, own in options.adapters.items()}
            modules = {label: open_network_module(name) for label, name in names.items() if name}
        arch = build(options.shared)
    report_unused(options.shared, arch.ignores)
    if options.shared.dataset.train_inpainting and not arch.inpaints:
        raise UserError.about("--train_inpainting", ": this base model takes no masks; leave it out")
    if arch.vae_overflows_in_fp16:
        warn_of_fp16_vae(options.shared.model, options.shared.precision.mixed_precision)
    return options, modules, arch


def resolve_run(
    options: ResolvedOptions[OptionsT],
    modules: Mapping[str, NetworkModule],
    arch: Architecture,
    processes: Processes,
    events: EventsOfAll,
) -> ResolvedRun:
    """Find the states to resume from, resolve the options that depend on them and on the processes, open the data, and
    choose what makes the run fit the memory.

    States are read before the data, because a resumed run keeps its state's seed, which sets the order of the data.
    """
    if processes.is_local_main:
        # Killed runs may leave shared weights in memory and latents on disk, tens of gigabytes for a large model.
        delete_abandoned_folders((IN_MEMORY, gettempdir()))
    shared = options.shared
    sharding = sharding_values(shared.distributed, shared.memory, shared.network, shared.compiling, processes)
    states = find_states(shared.state, shared.hub, options.names, processes, clears=options.writes)
    batches = batches_of_state(shared.run.gradient_accumulation_steps, states.of_run, processes.count)
    options = keep_values_of_states(options, states.by_label).with_values(sharding | batches)
    shared = options.shared
    if processes.is_main:
        check_repository(shared.hub)
    seed = opening.choose_seed(shared.run.seed, processes, states.of_run)
    text, formats = TextPlan.resolve(shared.network, arch.text_cache), BaseFormats.load(shared.precision)
    data = opening.open_training_data(shared, arch, text, seed, processes.count)
    adapters = [
        give_seed(
            AdapterRequest(own, modules[label], options.names[label], seed, states.by_label.get(label), its, label)
        )
        for (label, own), its in zip(options.adapters.items(), events.each, strict=True)
        if label in modules
    ]
    sweep = states.record or (SweepRecord(seed) if shared.sweep.sweep else None)
    run = ResolvedRun(RequestedRun(shared, adapters, arch, text, formats), seed, data, sweep)
    if shared.dataset.debug_dataset:
        return run
    if events.is_on:
        events.emit(Audit(**data.audit_values(), pairs=show_pairs(data.image_plan)))
    run = run if shared.fit.fit is None else fit_to_memory(run, processes, events)
    # An adapter that a sweep ended before a resume stays ended.
    left = [adapter for adapter in run.requested.adapters if sweep is None or adapter.label not in sweep.ended]
    return replace(run, requested=replace(run.requested, adapters=left))


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
    return options.with_each(next(iter(kept.values())), kept)


def give_seed(request: AdapterRequest) -> AdapterRequest:
    """Give an adapter of a sweep its own seed. All adapters are validated with the noise of the run's seed."""
    options, seed = request.options, request.options.run.seed
    if not request.label or seed is None or seed == request.seed:
        return request
    if options.validation.validation_seed is None:
        options = options.with_values({"validation_seed": request.seed})
    return replace(request, options=options, seed=seed)


def fit_to_memory(run: ResolvedRun, processes: Processes, events: EventsOfAll) -> ResolvedRun:
    """Apply the options that the memory planner chooses for the largest batch."""
    requested, sizes = run.requested, run.data.sizes
    assert sizes is not None, "options refuse to plan the memory of a user's class"
    fit = fit_run(requested, sizes, processes, run.data.image_plan)
    chosen, values = fit.choice.chosen, fit.values()
    assert chosen is not None, "fit_run raises where nothing fits"
    for adapter_events in events.each:
        adapter_events.planned = Planned(chosen.device_bytes, chosen.tensor_bytes, chosen.seconds)
    options = requested.options.with_values(values)
    adapters = [replace(adapter, options=adapter.options.with_values(values)) for adapter in requested.adapters]
    formats = BaseFormats.load(options.precision) if "base_format" in values else requested.formats
    return replace(run, requested=replace(requested, options=options, adapters=adapters, formats=formats), fit=fit)
