"""The run of one adapter on models shared by all adapters."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

from library.data.training_data import TrainingBatches, TrainingData
from library.processes import Processes
from library.protocols import Architecture
from library.training.evaluation.image_scores import Scorer
from library.training.evaluation.preview import Previews
from library.training.evaluation.validation import Validation
from library.training.loop.adapter_run import PreparedRun
from library.training.models.base_model import LoadedModels
from library.training.models.compute import Compute
from library.training.models.requests import AdapterRequest
from library.training.models.step_context import step_context
from library.training.reporting.progress import Progress
from library.training.reporting.step_events import NormMeter
from library.training.reporting.step_times import StepTimes
from library.training.reporting.trackers import Charts
from library.training.run.optimization import build_optimization
from library.training.run.shard_base_checks import preserves_in_step
from library.training.run.writer import build_writer, go_on
from library.training.run_parts import Run
from library.training.step.accumulation import Plan
from library.training.sweep_record import SweepRecord
from library.types import Conditioning, Prompt
from networks.core.protocol import AdoptedNetwork, Multiplexer


@dataclass(frozen=True)
class Shared:
    """The parts that all adapters of a run share."""

    arch: Architecture
    loaded: LoadedModels
    compute: Compute
    processes: Processes
    data: TrainingData
    batches: TrainingBatches
    plan: Plan
    times: StepTimes
    multiplexer: Multiplexer | None  # None for a single adapter
    sweep: SweepRecord | None


def build_run(request: AdapterRequest, network: AdoptedNetwork, shared: Shared, adapter_index: int) -> Run:
    """Build the run of the adapter with this index in the sweep."""
    options, arch, compute = request.options, shared.arch, shared.compute
    models = shared.loaded.models
    optimization = build_optimization(request, network, models, shared.plan.max_train_steps, compute.device)
    alone = nullcontext if shared.multiplexer is None else partial(shared.multiplexer.only, adapter_index)
    context = step_context(
        options.trains_text_encoders, options.caching.vae_batch_size, arch, request.seed, shared.loaded, network,
        compute, alone, options.pairs,
    )  # fmt: skip
    context = replace(context, preserves_in_step=preserves_in_step(shared.data, models.sharded))
    return Run(
        options=options,
        processes=shared.processes,
        data=shared.data,
        batches=shared.batches,
        plan=shared.plan,
        context=context,
        optimization=optimization,
        times=shared.times,
        events=request.events,
        norms=NormMeter(request.events.is_on),
        label=request.label,
        adapter_index=adapter_index,
        multiplexer=shared.multiplexer,
        sweep=shared.sweep,
    )


def prepare_run(
    run: Run,
    request: AdapterRequest,
    progress: Progress,
    charts: Charts,
    prompts: Sequence[Prompt],
    encoded: Mapping[str, Conditioning] | None,
    scorer: Scorer | None,
) -> PreparedRun:
    """Build everything that writes, draws and validates for one adapter, and restore its state."""
    state = request.state
    charts = charts.named(run.label)
    validation = Validation(run, charts)
    assert request.names is not None, "an adapter that is trained has names"
    writer = build_writer(run, request.names, progress, validation)
    if not run.options.diagnostics.dry_run:
        writer.check_space()
    if state is not None:  # after every stateful part exists, and before anything is drawn or measured
        go_on(run, progress, validation, state)
    # The main process alone reads the prompts, but with a sharded model the others compute its blocks with it.
    is_drawing = run.processes.share(f"are there previews {run.label}", "yes" if prompts else "no") == "yes"
    previews = Previews(run, charts, prompts, encoded, is_drawing, scorer)
    # With --initial_step the run leaves the state's step, so nothing is left to do at it.
    resumed = state if state is not None and state.step == progress.step else None
    return PreparedRun(run, progress, writer, charts, previews, validation, resumed)
