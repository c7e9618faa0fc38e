"""Checkpoints and states of a run: building their writer, and restoring from a state."""

import logging
import secrets
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from torch import Tensor

from library.checkpoints.metadata import RunSummary, base_file_metadata, training_metadata
from library.options.training.averaging import FILES
from library.training.evaluation.validation import Validation
from library.training.evaluation.without_side_effects import show_weights
from library.training.models.network import network_keywords
from library.training.optimization.lr_schedules import base_rates, follow_rates
from library.training.reporting.progress import Part, Progress
from library.training.run_parts import Run
from library.training.saving.checkpoints import Writer
from library.training.saving.finished import digest_run
from library.training.saving.hub import Uploads
from library.training.saving.names import Names
from library.training.saving.resume import LATENTS, record_options, report_differences, shares_to_store
from library.training.saving.schedule import Schedule
from library.training.saving.state import (
    OptimizerState,
    Stateful,
    StateManifest,
    restore,
    save_state,
    weights_and_buffers,
)
from library.training.saving.timed import TimedStates

logger = logging.getLogger(__name__)


def stateful_parts(run: Run, progress: Progress, validation: Validation) -> dict[str, Stateful]:
    """Return every stateful part besides the adapter, by its name in a state."""
    optimization = run.optimization
    parts: dict[str, Stateful] = {
        "optimizer": OptimizerState(optimization.optimizer, optimization.built.name),
        "schedule": optimization.schedule,
        "progress": progress,
    }
    if optimization.average is not None:
        parts["average"] = optimization.average
    if validation.is_on:
        parts["validation"] = validation.record
    if validation.probe.is_on:
        parts["forgetting"] = validation.probe.record
    return parts if optimization.scaler is None else {**parts, "scaler": optimization.scaler}


def go_on(run: Run, progress: Progress, validation: Validation, state: StateManifest) -> None:
    """Restore a run from a state, at the step that the options may override."""
    first_step = progress.step
    data, optimization = run.data, run.optimization
    report_differences(state, run.options, data.identity_with_contents, run.processes.count, data.image_paths)
    # `restore` replaces the rates of this run by those of the state.
    rates = base_rates(optimization.optimizer)
    restore(state, run.context.network.module, stateful_parts(run, progress, validation))
    follow_rates(optimization.schedule, optimization.optimizer, rates)
    progress.step = first_step
    if first_step == state.step:
        progress.done = set(state.done)
    progress.average.keep_batches_below(run.plan.num_batches)  # images may have been removed since
    logger.info("resuming from %s at step %d of %d", state.path, first_step, run.plan.max_train_steps)
    if "sweep" in state.parts:
        logger.info("the state is of a sweep of an earlier version; it continues as a single run")


def bytes_of_state(run: Run) -> int:
    """Estimate the size of a state: weights, buffers and optimizer state, or two tensors per weight before there is
    any."""
    network = run.context.network
    state_values = [value for state in run.optimization.optimizer.state.values() for value in state.values()]
    tensors = [value for value in state_values if isinstance(value, Tensor)]
    parameters = network.trainable_parameters()
    expected = () if tensors else 2 * parameters
    averaged = () if run.optimization.average is None else run.optimization.average.values or parameters
    return sum(t.nbytes for t in (*weights_and_buffers(network.module).values(), *tensors, *expected, *averaged))


def build_writer(
    run: Run, names: Names, progress: Progress, validation: Validation, resumed: StateManifest | None
) -> Writer:
    """Build the writer of checkpoints of a run that goes on from the state `resumed`; base files are hashed in the
    background meanwhile."""
    options, data, plan, built = run.options, run.data, run.plan, run.optimization.built
    summary = RunSummary(
        # Not drawn from a seeded generator, so that runs with one seed can be told apart.
        session_id=secrets.randbelow(2**32),
        started_at=time.time(),
        seed=run.context.seed,
        num_train_images=data.num_train_images,
        num_validation_images=validation.num_images,
        num_reg_images=data.num_reg_images,
        num_batches_per_epoch=plan.num_batches,
        num_epochs=plan.num_epochs,
        max_train_steps=plan.max_train_steps,
        optimizer=built.name,
        has_relative_step=built.has_relative_step,
        network_args=network_keywords(options.network),
        datasets=data.metadata(options.dataset, plan.accumulation),
        run_digest=digest_run(options, data, run.context.seed),
    )
    executor = ThreadPoolExecutor(1, thread_name_prefix="hash")
    base_files = executor.submit(base_file_metadata, options.model)
    executor.shutdown(wait=False)

    num_processes, accumulation = shares_to_store(resumed, options.run.gradient_accumulation_steps, run.processes.count)
    recorded = record_options(options) | {"gradient_accumulation_steps": accumulation}

    def write_state(folder: Path, step: int, epoch: int, done: Collection[Part]) -> None:
        save_state(
            folder,
            step=step,
            epoch=epoch,
            seed=run.context.seed,
            num_processes=num_processes,
            options=recorded,
            dataset={**data.identity_with_contents, LATENTS: run.context.arch.codec.spec.computed_as},
            network=run.context.network.module,
            keepers=stateful_parts(run, progress, validation),
            done=done,
        )

    return Writer(
        options=options,
        is_main=run.processes.is_main,
        names=names,
        schedule=Schedule.build(options.saving, plan.num_epochs),
        network=run.context.network,
        architecture=run.context.arch.metadata,
        metadata=training_metadata(options, run.context.arch.metadata, summary),
        base_files=base_files,
        saved_weights=lambda: show_weights(run, FILES),
        write_state=write_state,
        uploads=Uploads(options.hub),
        resolution=None if data.image_plan is None else data.image_plan.largest_resolution,
        state_bytes=partial(bytes_of_state, run),
        timed=TimedStates(
            options.state.save_every_n_minutes,
            [] if resumed is None or resumed.path not in names.list_timed_states() else [resumed.path.name],
        ),
        specs=run.context.arch.specs,
        events=run.events,
    )
