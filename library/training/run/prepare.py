"""Builds a run in stages, each of which returns a small frozen value, in the order of their dependencies."""

from dataclasses import replace
from typing import Any

from library.data.training_data import TrainingData, open_batches
from library.memory.fused_kernels import decide_fusing
from library.memory.planner.measured import measure_peak_flops
from library.processes.process_group import Processes
from library.training.evaluation.preview import Previews
from library.training.evaluation.validation import Validation
from library.training.loop.steps import PreparedRun
from library.training.models.compute import Compute
from library.training.models.requests import RequestedRun
from library.training.models.step_context import step_context
from library.training.reporting.console_lines import ImageCounts, announce_run
from library.training.reporting.progress import Progress
from library.training.reporting.step_events import NormMeter
from library.training.reporting.step_times import StepTimes
from library.training.reporting.trackers import Charts, loggable_options, start_trackers
from library.training.run.adapted import AdaptedModels, check_models, load_adapted
from library.training.run.optimization import build_optimization
from library.training.run.run_events import build_plan_event
from library.training.run.shard_base_checks import preserves_in_step
from library.training.run.wanted_previews import WantedPreviews, read_wanted_previews
from library.training.run.writer import build_writer, go_on
from library.training.run_parts import Run
from library.training.saving.checkpoints import save_dtype
from library.training.saving.resume import check_latents, resolve_starting_step
from library.training.step.accumulation import StepPlan


def prepare(requested: RequestedRun, data: TrainingData, accelerator: Any, processes: Processes) -> PreparedRun:
    """Load the models, attach the adapter, build its optimizer and restore its state.

    Raises UserError for settings that can only be checked here, such as a network argument.
    """
    options, arch, state = requested.options, requested.arch, requested.state
    # Raises for a wrong value, which would otherwise be noticed only once everything is loaded and cached.
    save_dtype(options.saving.save_precision)
    require_same_data(data, processes)
    compute = Compute.build(options.precision, processes.device)
    plan = StepPlan.build(options.run, data.num_batches, processes.count)
    assert requested.names is not None, "a run that is trained has names"
    progress = Progress(resolve_starting_step(options.state, requested.names.of_end(), plan, state))
    if state is not None and data.prompts is None:
        check_latents(state, arch.codec.spec.computed_as)
    check_models(requested, compute, plan.max_train_steps)
    decide_fusing(compute.device)
    wanted = read_wanted_previews(options.preview, arch, data) if processes.is_main else WantedPreviews()
    if processes.is_main:
        start_trackers(accelerator, options.trackers, loggable_options(options))  # a broken one ends the run here
    adapted = load_adapted(requested, data, compute, wanted.texts, processes)
    run = build_run(requested, adapted, plan, data, compute, processes)
    prepared = prepare_run(run, requested, progress, Charts(accelerator), wanted, adapted)
    if processes.is_main:
        counts = ImageCounts(data.num_train_images, prepared.validation.num_images, data.num_reg_images)
        announce_run(plan, counts, data.batch_sizes, options.run.gradient_accumulation_steps)
        resumed_from = None if state is None else str(state.path)
        run.events.emit(build_plan_event(run, counts, progress.step, resumed_from))
    return prepared


def build_run(
    requested: RequestedRun,
    adapted: AdaptedModels,
    plan: StepPlan,
    data: TrainingData,
    compute: Compute,
    processes: Processes,
) -> Run:
    """Build what a step computes with."""
    options, loaded, network = requested.options, adapted.loaded, adapted.network
    times = StepTimes(compute.device, processes.count, measure_peak_flops(compute.device, compute.dtype))
    # After everything that encodes has left memory: the batches take latents and features from the finished caches.
    batches = open_batches(data, loaded.latents, loaded.texts)
    optimization = build_optimization(options, network, loaded.models, plan.max_train_steps, compute.device)
    context = step_context(
        options.trains_text_encoders, options.caching.vae_batch_size, requested.arch, requested.seed, loaded, network,
        compute, options.pairs, options.guidance,
    )  # fmt: skip
    context = replace(context, preserves_in_step=preserves_in_step(data, loaded.models.sharded))
    norms = NormMeter(requested.events.is_on)
    return Run(options, processes, data, batches, plan, context, optimization, times, requested.events, norms)


def prepare_run(
    run: Run,
    requested: RequestedRun,
    progress: Progress,
    charts: Charts,
    wanted: WantedPreviews,
    adapted: AdaptedModels,
) -> PreparedRun:
    """Build everything that writes, draws and validates, and restore the state."""
    state = requested.state
    validation = Validation(run, charts)
    assert requested.names is not None, "a run that is trained has names"
    writer = build_writer(run, requested.names, progress, validation, state)
    if not run.options.diagnostics.dry_run:
        writer.check_space()
    if state is not None:  # after every stateful part exists, and before anything is drawn or measured
        go_on(run, progress, validation, state)
    if state is None:
        validation.require_pause(run.options.state.pause_after_step)
    # The main process alone reads the prompts, but with a sharded model the others compute its blocks with it.
    is_drawing = run.processes.share("are there previews", "yes" if wanted.prompts else "no") == "yes"
    previews = Previews(run, charts, wanted.prompts, adapted.loaded.prompts, is_drawing, wanted.scorer)
    # With --initial_step the run leaves the state's step, so nothing is left to do at it.
    resumed = state if state is not None and state.step == progress.step else None
    return PreparedRun(run, progress, writer, charts, previews, validation, resumed)


def require_same_data(data: TrainingData, processes: Processes) -> None:
    """Raise UserError if processes found different images, because their shares of an epoch would not match."""
    if processes.count > 1:
        identity = data.identity
        size = f"{identity['num_pictures']} images in {identity['num_batches']} batches"
        processes.require_same(
            "the dataset", f"{size} ({identity['pictures']}, {identity['captions']}, {identity['settings']})"
        )
