"""The training loop."""

import logging
import math
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from library.determinism import explain_nondeterminism
from library.training.failures.interruption import Interruption
from library.training.failures.nondeterministic import find_nondeterministic_module
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
    adapter_runs = [AdapterRun(adapter, interruption, bar) for adapter in adapters]
    num_adapters = len(adapters) + (0 if run.sweep is None else len(run.sweep.ended))  # including those that have ended
    epoch = plan.epoch_of(step)
    begin(adapter_runs)
    num_profiled = run.options.trackers.profile if is_main else 0
    profile = adapters[0].writer.names.of_profile()
    with ExitStack() as stack:
        # At exit torch waits five seconds for each worker that still runs, kills it and prints a traceback.
        stack.callback(run.batches.close)
        stack.enter_context(bar)
        profile_step = stack.enter_context(profile_steps(num_profiled, profile, run.context.device))
        for adapter in adapter_runs:
            stack.enter_context(adapter.updates.reported_at_end())
        stack.callback(run.times.watch_inputs(run.context.models.denoiser).remove)
        run.times.start()
        active = end_early_stopped(adapter_runs, epoch)
        stops = any(adapter.lacks_previews for adapter in adapter_runs)
        for epoch in plan.epochs(step) if step < plan.max_train_steps and active and not stops else ():
            start_epoch(active, epoch, plan.num_epochs)
            run.times.start_epoch()
            prefetcher = iterate_batches(run, epoch, step)
            batches = prefetcher if watch is None else watch.noting(prefetcher)
            for window in plan.windows(epoch, step):
                with watching(watch):
                    sharing = [adapter.run for adapter in active]
                    losses = accumulate_gradients(sharing, window, batches, prefetcher.fetch, memory_hints)
                    stops = apply_gradients(active, window, losses, interruption.is_requested) or stops
                    run.times.end_step()
                    profile_step()
                step += 1
                active = finish_step(active, window, stops)
                # Only the weights of this step can draw the previews that a signal cut off.
                stops = stops or any(adapter.lacks_previews for adapter in active)
                delete_outdated(active)
                active = end_early_stopped(end_worse(active, step, epoch, num_adapters, find_worse), epoch)
                if stops or not active:
                    break
            if stops or not active:
                break
    run.batches.report_skipped(logger)
    end(active, epoch)
    raise_failures(adapter_runs)


def raise_failures(adapter_runs: Sequence[AdapterRun]) -> None:
    """Raise what ended an adapter, now that the others are saved."""
    for failure in (adapter.failure for adapter in adapter_runs if adapter.failure is not None):
        raise failure


def begin(adapter_runs: Sequence[AdapterRun]) -> None:
    """Do the work that precedes the first step of each adapter."""
    for adapter in adapter_runs:
        with adapter.prefix_logs():
            adapter.begin()
    delete_outdated(adapter_runs)


def start_epoch(active: Sequence[AdapterRun], epoch: int, num_epochs: int) -> None:
    announce_epoch(epoch, num_epochs)
    for adapter in active:
        adapter.start_epoch()


@contextmanager
def watching(watch: StepWatch | None) -> Iterator[None]:
    """Tell `watch` when the step in the block begins and ends."""
    if watch is not None:
        watch.before_step()
    yield
    if watch is not None:
        watch.after_step()


def apply_gradients(active: Sequence[AdapterRun], window: Window, losses: Sequence[Tensor], wants_stop: bool) -> bool:
    """Update each adapter. Return True if any process requests a stop."""
    stops = False
    for adapter, local_losses in zip(active, losses, strict=True):
        with adapter.ending_alone(any_goes_on(active, adapter)):
            stops = adapter.apply_gradients(window, local_losses, wants_stop) or stops
    return stops


def finish_step(active: Sequence[AdapterRun], window: Window, stops: bool) -> list[AdapterRun]:
    """Count the step of each adapter, and do what is due after it. Return the adapters that the step has not ended."""
    going_on = [adapter for adapter in active if not adapter.progress.ended]
    for adapter in going_on:
        with adapter.ending_alone(any_goes_on(going_on, adapter)):
            adapter.finish_step(window, stops)
    return going_on


def end(active: Sequence[AdapterRun], epoch: int) -> None:
    for adapter in active:
        with adapter.prefix_logs():
            adapter.end(epoch)


def any_goes_on(active: Sequence[AdapterRun], adapter: AdapterRun) -> bool:
    """Return True if another adapter than this one is still trained."""
    return any(other is not adapter and not other.progress.ended for other in active)


def delete_outdated(adapter_runs: Sequence[AdapterRun]) -> None:
    """Delete outdated files once every adapter has saved this step: a sweep resumes from a step that all adapters
    have."""
    writers = [adapter.prepared.writer for adapter in adapter_runs]
    if all(w.rotation.saved_step == adapter.progress.step for w, adapter in zip(writers, adapter_runs, strict=True)):
        for adapter, writer in zip(adapter_runs, writers, strict=True):
            with adapter.prefix_logs():
                writer.delete_outdated()


def end_worse(
    active: list[AdapterRun], step: int, epoch: int, num_adapters: int, find_worse: FindWorse | None
) -> list[AdapterRun]:
    """End the adapters that are significantly worse, after saving their files. Return the others."""
    after = active[0].run.options.sweep.sweep_stop_after if active else None
    if find_worse is None or after is None or step < after:
        return active
    losses = {adapter.run.label: adapter.validation.record.losses_after(step) for adapter in active}
    measured = {label: losses_G for label, losses_G in losses.items() if losses_G is not None}
    # Adapters are compared pair by pair on the same images after the same step.
    if len(measured) < len(active):
        return active
    worse = find_worse(measured, num_adapters, active[0].validation.record.num_evaluations)
    for adapter in (adapter for adapter in active if adapter.run.label in worse):
        with adapter.prefix_logs():
            adapter.drop(epoch)
    return [adapter for adapter in active if not adapter.progress.ended]


def end_early_stopped(adapter_runs: Sequence[AdapterRun], epoch: int) -> list[AdapterRun]:
    """End the adapters whose validation stopped them, after saving. Return those that keep training."""
    end([a for a in adapter_runs if a.validation.stop_reason is not None and not a.progress.ended], epoch)
    return [adapter for adapter in adapter_runs if not adapter.progress.ended]


def iterate_batches(run: Run, epoch: int, first_step: int) -> Ahead:
    """Iterate over this process's batches of an epoch that follow `first_step` finished steps; no others are loaded."""
    dataset, cache = run.options.dataset, run.context.arch.text_cache
    windows = run.plan.windows(epoch, first_step)
    batch_indices = array("i", (i for window in windows for i in assign_batches(run, window)))  # up to a million
    batches = run.batches.iterate_epoch(
        epoch,
        batch_indices,
        partial(run.plan.step_of, epoch),
        dataset.max_data_loader_n_workers,
        dataset.persistent_data_loader_workers,
    )
    device, on_host = run.context.device, () if cache is None else cache.on_host
    return Ahead(batches, len(batch_indices), CudaCopies(device, on_host) if device.type == "cuda" else None, run.times)


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
    num_local = len(window.share(run.processes.rank, run.processes.count))
    for number, batch_index in enumerate(assign_batches(run, window)):
        batch = next(batches)
        # The true number of batches, which is smaller in the last window of an epoch; sd-scripts always divides by the
        # full one. A padding batch is divided by infinity, so its gradient is zero.
        size = len(window.batch_indices) if number < num_local else math.inf
        doing = f"computing step {window.step + 1}, forward and backward"
        shape, predicted = describe_shape(batch), partial(memory_hints, runs, batch)
        batch_number = run.plan.batch_number(window.epoch, batch_index)
        with (
            explain_nondeterminism(partial(find_nondeterministic_module, run, batch, batch_number, window.step)),
            explain_out_of_memory(doing, run.options, run.context.device, shape, lambda: measure_sizes(run), predicted),
        ):
            if is_stacked(runs, batch):
                batch_losses = backward_stacked(runs, batch, batch_number, size, window.step)
            else:
                batch_losses = [backward(adapter, batch, batch_number, size, window.step) for adapter in runs]
        for adapter_losses, loss in zip(losses, batch_losses, strict=True):
            adapter_losses.append(loss)
        fetch_next()
    return [torch.stack(adapter_losses[:num_local]) if num_local else torch.zeros(0) for adapter_losses in losses]


def assign_batches(run: Run, window: Window) -> list[int]:
    """Return the indices of the batches that this process computes: its share of the window, and a padding batch if a
    sharded model needs one."""
    processes = run.processes
    share = [*window.share(processes.rank, processes.count)]
    padding = None
    if run.context.models.sharded is not None:
        padding = window.padding_batch(processes.rank, processes.count)
    return share if padding is None else [*share, padding]


def backward(run: Run, batch: Batch, batch_number: int, window_size: float, step: int) -> Tensor:
    """Accumulate the gradient of one batch. Return its loss."""
    losses = []
    with run.context.alone():
        for pass_batch in split_passes(run.context, batch):
            with run.times.counted(pass_batch) as begin_backward:
                with run.times.stage("forward"):
                    # Seeded for each pass, so both sides of a pair get the same dropout.
                    start_batch(run.context, batch_number, step)
                    loss = loss_of(run.context, pass_batch, batch_number)
                    scaled = loss / window_size
                begin_backward()
                with run.times.stage("backward"):
                    scaler = run.optimization.scaler
                    torch.autograd.backward(scaled if scaler is None else scaler.scale(scaled))
            losses.append(loss.detach().float())
    # `split_passes` gives each side of a pair half the weight, so the sum is the loss of the batch.
    return torch.stack(losses).sum()
