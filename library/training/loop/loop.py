"""The training loop."""

import logging
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from library.training.failures.interruption import Interruption
from library.training.failures.out_of_memory import explain_out_of_memory, measure_sizes
from library.training.loop.adapter_run import AdapterRun, PreparedRun
from library.training.loop.ahead import Ahead, CudaCopies
from library.training.loop.stacked_step import backward_stacked, is_stacked
from library.training.reporting.console_lines import StepBar, announce_epoch
from library.training.reporting.profile import profile_steps
from library.training.run_parts import Run
from library.training.step.accumulation import Window
from library.training.step.losses import describe_shape, loss_of, start_batch
from library.training.step.pairs import split_passes
from library.types import Batch

logger = logging.getLogger(__name__)


class StepWatch(Protocol):
    """Observes the steps of a run."""

    def noting(self, batches: Iterator[Batch]) -> Iterator[Batch]: ...
    def before_step(self) -> None: ...
    def after_step(self) -> None: ...


FindWorse = Callable[[Mapping[str, Sequence[float]], int, int], list[str]]
"""(validation losses by adapter, number of adapters, of evaluations) -> the adapters that are significantly worse."""
MemoryHints = Callable[[Sequence[Run], Batch], list[str]]
"""(runs that share the step, batch) -> lines naming options that need less memory, for out-of-memory errors."""


def train(
    adapters: Sequence[PreparedRun],
    interruption: Interruption,
    watch: StepWatch | None = None,
    memory_hints: MemoryHints = lambda runs, batch: [],
    find_worse: FindWorse | None = None,
) -> None:
    """Train until the last step, or until the step in which the user interrupts the run.

    Every adapter is saved in both cases. `watch` is called around each step; `find_worse` is required if adapters may
    end early. A resumed run first does the work that was scheduled at the step of its state and not finished.
    """
    run, step = adapters[0].run, adapters[0].progress.step  # shared by all adapters
    plan, is_main = run.plan, run.processes.is_main
    bar = StepBar(plan.max_train_steps, step, is_main)
    adapter_runs = [AdapterRun(one, interruption, bar) for one in adapters]
    num_adapters = len(adapters) + (0 if run.sweep is None else len(run.sweep.ended))  # including those that have ended
    stops = False
    epoch = plan.epoch_of(step)
    for one in adapter_runs:
        with one.named():
            one.begin()
    delete_outdated(adapter_runs)
    num_profiled = run.options.trackers.profile if is_main else 0
    profile = adapters[0].writer.names.path_with_ending("-profile.json.gz")
    with ExitStack() as stack:
        stack.callback(run.batches.close)
        stack.enter_context(bar)
        profile_step = stack.enter_context(profile_steps(num_profiled, profile, run.context.device))
        for one in adapter_runs:
            stack.enter_context(one.updates.reported_at_end())
        run.times.start()
        going = end_stopped(adapter_runs, epoch)
        for epoch in plan.epochs(step) if step < plan.max_train_steps and going else ():
            announce_epoch(epoch, plan.num_epochs)
            for one in going:
                one.start_epoch()
            ahead = iterate_batches(run, epoch, step)
            batches = ahead if watch is None else watch.noting(ahead)
            for window in plan.windows(epoch, step):
                if watch is not None:
                    watch.before_step()
                losses = accumulate_gradients([one.run for one in going], window, batches, ahead.fetch, memory_hints)
                wants_stop = interruption.is_requested
                for one, own_losses in zip(going, losses, strict=True):
                    with one.ending_alone(len(going) > 1):
                        stops = one.move(window, own_losses, wants_stop) or stops
                run.times.end_step()
                profile_step()
                if watch is not None:
                    watch.after_step()
                step += 1
                for one in going:
                    with one.ending_alone(len(going) > 1):
                        one.finish_step(window, stops)
                delete_outdated(going)
                if find_worse is not None:
                    going = end_worse(going, step, epoch, num_adapters, find_worse)
                going = end_stopped(going, epoch)
                if stops or not going:
                    break
            if stops or not going:
                break
    run.batches.report_skipped(logger)
    for one in going:
        with one.named():
            one.end(epoch)


def delete_outdated(adapter_runs: Sequence[AdapterRun]) -> None:
    """Delete outdated files once every adapter has saved this step: a sweep resumes from a step that all adapters
    have."""
    writers = [one.prepared.writer for one in adapter_runs]
    if all(w.rotation.saved_step == one.progress.step for w, one in zip(writers, adapter_runs, strict=True)):
        for one, writer in zip(adapter_runs, writers, strict=True):
            with one.named():
                writer.delete_outdated()


def end_worse(
    going: list[AdapterRun], step: int, epoch: int, num_adapters: int, find_worse: FindWorse
) -> list[AdapterRun]:
    """End the adapters that are significantly worse, after saving their files. Return the others."""
    after = going[0].run.options.sweep.sweep_stop_after if going else None
    if after is None or step < after:
        return going
    losses = {one.run.label: one.validation.record.losses_after(step) for one in going}
    measured = {label: found for label, found in losses.items() if found is not None}
    if len(measured) < len(going):
        return going
    worse = find_worse(measured, num_adapters, going[0].validation.record.num_evaluations)
    for one in (one for one in going if one.run.label in worse):
        with one.named():
            one.drop(epoch)
    return [one for one in going if not one.progress.ended]


def end_stopped(adapter_runs: Sequence[AdapterRun], epoch: int) -> list[AdapterRun]:
    """End the adapters whose validation stopped them, after saving. Return those that keep training."""
    for one in adapter_runs:
        if one.validation.stop_reason is not None and not one.progress.ended:
            with one.named():
                one.end(epoch)
    return [one for one in adapter_runs if not one.progress.ended]


def iterate_batches(run: Run, epoch: int, first_step: int) -> Ahead:
    """Iterate over this process's batches of an epoch that follow `first_step` finished steps; no others are loaded."""
    dataset, cache = run.options.dataset, run.context.arch.text_cache
    windows = run.plan.windows(epoch, first_step)
    places = array("i", (place for window in windows for place in assign_places(run, window)))  # up to a million
    batches = run.batches.of_epoch(
        epoch,
        places,
        partial(run.plan.step_of, epoch),
        dataset.max_data_loader_n_workers,
        dataset.persistent_data_loader_workers,
    )
    device, on_host = run.context.device, () if cache is None else cache.on_host
    return Ahead(batches, len(places), CudaCopies(device, on_host) if device.type == "cuda" else None, run.times)


def accumulate_gradients(
    runs: Sequence[Run],
    window: Window,
    batches: Iterator[Batch],
    fetch_next: Callable[[], None] = lambda: None,
    memory_hints: MemoryHints = lambda runs, batch: [],
) -> list[Tensor]:
    """Accumulate the gradients of this process's batches of a window. Return their losses, for each adapter.

    `fetch_next` is called when all work on a batch is queued on the device.
    """
    run = runs[0]
    losses: list[list[Tensor]] = [[] for _ in runs]
    num_own = len(window.share(run.processes.rank, run.processes.count))
    for number, place in enumerate(assign_places(run, window)):
        batch = next(batches)
        # A padding batch is divided by infinity, so its gradient is zero.
        size = len(window.places) if number < num_own else math.inf
        doing = f"computing step {window.step + 1}, forward and backward"
        shape, predicted = describe_shape(batch), partial(memory_hints, runs, batch)
        with explain_out_of_memory(
            doing, run.options, run.context.device, shape, lambda: measure_sizes(run), predicted
        ):
            batch_number = run.plan.batch_number(window.epoch, place)
            if is_stacked(runs, batch):
                found = backward_stacked(runs, batch, batch_number, size, window.step)
            else:
                found = [backward(own, batch, batch_number, size, window.step) for own in runs]
        for own, loss in zip(losses, found, strict=True):
            own.append(loss)
        fetch_next()
    return [torch.stack(own[:num_own]) if num_own else torch.zeros(0) for own in losses]


def assign_places(run: Run, window: Window) -> list[int]:
    """Return the positions that this process computes: its share of the window, and a padding batch if a sharded
    model needs one."""
    processes = run.processes
    share = [*window.share(processes.rank, processes.count)]
    stand_in = None
    if run.context.models.sharded is not None:
        stand_in = window.stand_in(processes.rank, processes.count)
    return share if stand_in is None else [*share, stand_in]


def backward(run: Run, batch: Batch, batch_number: int, window_size: float, step: int) -> Tensor:
    """Accumulate the gradient of one batch. Return its loss."""
    losses = []
    with run.context.alone():
        for one in split_passes(run.context, batch):
            with run.times.counted(one) as turn_back:
                with run.times.stage("forward"):
                    start_batch(run.context, batch_number, step)
                    loss = loss_of(run.context, one, batch_number)
                    scaled = loss / window_size
                turn_back()
                with run.times.stage("backward"):
                    scaler = run.optimization.scaler
                    torch.autograd.backward(scaled if scaler is None else scaler.scale(scaled))
            losses.append(loss.detach().float())
    return torch.stack(losses).sum()
