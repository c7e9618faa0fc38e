"""A run before any model is loaded: every value that follows from the options is resolved here, once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, TypeVar

import torch

from library.data.training_data import TrainingData
from library.environment.hidden_libraries import BITSANDBYTES, hide_library
from library.options.train import TrainOptions
from library.processes.process_group import Processes
from library.protocols import Architecture
from library.training.command_line.outputs import writes
from library.training.command_line.pairs import show_pairs
from library.training.failures.out_of_memory import explain_out_of_memory
from library.training.loop.loop import MemoryHints
from library.training.models import opening
from library.training.models.requests import RequestedRun
from library.training.models.text_caching import TextPlan
from library.training.models.weight_formats import BaseFormats
from library.training.planning.advice import memory_hints
from library.training.planning.fit import Fit
from library.training.planning.fit_run import fit_run
from library.training.reporting.event_stream import Events
from library.training.reporting.events import Audit, Planned
from library.training.run.shard_base_checks import sharding_values
from library.training.saving.finished import check_unfinished, digest_run
from library.training.saving.hub import check_repository
from library.training.saving.names import Names
from library.training.saving.resume import alpha_of_state, batches_of_state, clear_up, find_state, rates_of_state
from library.training.saving.state import StateManifest
from networks.core.protocol import NetworkModule

OptionsT = TypeVar("OptionsT", bound=TrainOptions)


@dataclass(frozen=True)
class Start(Generic[OptionsT]):
    """Where a run starts, and the options that its state and its processes change."""

    options: OptionsT
    arch: Architecture
    text: TextPlan
    formats: BaseFormats
    names: Names | None  # of the files that it writes; None without an output folder
    state: StateManifest | None  # to resume from
    seed: int


@dataclass(frozen=True)
class ResolvedRun:
    """A run whose data is open."""

    requested: RequestedRun
    data: TrainingData
    fit: Fit | None = None  # None without --fit

    @contextmanager
    def loading(self, device: torch.device) -> Iterator[None]:
        """Explain in the block what the run lacks while models are loaded and data is encoded."""
        doing = "loading the models and caching"
        with (
            self.requested.events.stage("loading"),
            explain_out_of_memory(doing, self.requested.options, device, ""),
            hide_library(BITSANDBYTES),
        ):
            yield

    @property
    def memory_hints(self) -> MemoryHints:
        return partial(memory_hints, self.requested)


def resolve_start(options: OptionsT, arch: Architecture, names: Names | None, processes: Processes) -> Start[OptionsT]:
    """Find the state to resume from, and resolve the options that depend on it and on the processes.

    The state is read before the data, because a resumed run keeps its seed, which sets the order of the data.
    """
    if processes.is_local_main:
        opening.delete_leftovers()
    sharding = sharding_values(options.distributed, options.memory, options.network, options.compiling, processes)
    if names is not None and writes(options.diagnostics, options.dataset) and processes.is_main:
        clear_up(names)
    state = find_state(options.state, options.hub, names, processes)
    kept = rates_of_state(options, state) | alpha_of_state(options.network.network_alpha, state)
    batches = batches_of_state(options.run.gradient_accumulation_steps, state, processes.count)
    if processes.is_main:
        check_repository(options.hub)
    seed = opening.choose_seed(options.run.seed, processes, state)
    text, formats = TextPlan.resolve(options.network, arch.text_cache), BaseFormats.load(options.precision)
    return Start(options.with_values(kept | sharding | batches), arch, text, formats, names, state, seed)


def resolve_run(
    start: Start[OptionsT], module: NetworkModule, data: TrainingData, processes: Processes, events: Events
) -> ResolvedRun:
    """Choose what makes the run fit the memory. Raises AlreadyComplete for a finished run that may be skipped."""
    requested = RequestedRun(
        start.options, module, start.arch, start.text, start.formats, start.names, start.seed, start.state, events
    )
    if events.is_on:
        events.emit(Audit(**data.audit_values(), pairs=show_pairs(data.image_plan)))
    run = ResolvedRun(requested, data)
    run = run if start.options.fit.fit is None else fit_to_memory(run, processes)
    if (
        start.options.state.skip_finished
        and start.names is not None
        and writes(start.options.diagnostics, start.options.dataset)
    ):
        check_unfinished(start.names, digest_run(run.requested.options, data, start.seed))
    return run


def fit_to_memory(run: ResolvedRun, processes: Processes) -> ResolvedRun:
    """Apply the options that the memory planner chooses for the largest batch."""
    requested, sizes = run.requested, run.data.sizes
    assert sizes is not None, "options refuse to plan the memory of a user's class"
    fit = fit_run(requested, sizes, processes, run.data.image_plan)
    chosen, values = fit.choice.chosen, fit.values()
    assert chosen is not None, "fit_run raises where nothing fits"
    requested.events.planned = Planned(chosen.device_bytes, chosen.tensor_bytes, chosen.seconds)
    options = requested.options.with_values(values)
    formats = BaseFormats.load(options.precision) if "base_format" in values else requested.formats
    return replace(run, requested=replace(requested, options=options, formats=formats), fit=fit)
