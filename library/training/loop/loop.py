"""The training loop."""

import logging
import math
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from library.base.determinism import explain_nondeterminism
from library.training.failures.interruption import Interruption
from library.training.failures.nondeterministic import find_nondeterministic_module
from library.training.failures.out_of_memory import explain_out_of_memory, measure_sizes
from library.training.loop.ahead import Ahead, CudaCopies
from library.training.loop.steps import PreparedRun, Steps
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


MemoryHints = Callable[[Run, Batch], list[str]]
"""(run, batch) -> lines naming options that need less memory, for out-of-memory errors."""


def train(
    prepared: PreparedRun,
    interruption: Interruption,
    watch: StepWatch | None = None,
    memory_hints: MemoryHints = lambda run, batch: [],
) -> None:
    """Train until the last step, until validation stops the run, or until the step in which the user interrupts it;
    each of them saves the run.

    `watch` is called around each step. A resumed run first does the work that was scheduled at the step of its state
    and not finished.
    """
    run, plan, progress = prepared.run, prepared.run.plan, prepared.progress
    bar = StepBar(plan.max_train_steps, progress.step, run.processes.is_main)
    steps = Steps(prepared, interruption, bar)
    steps.begin()
    epoch = plan.epoch_of(progress.step)
    with measuring_steps(prepared, bar, steps) as end_step:
        for epoch in plan.epochs(progress.step) if steps.are_left else ():
            announce_epoch(epoch, plan.num_epochs)
            steps.start_epoch()
            prefetcher = iterate_batches(run, epoch, progress.step)
            batches = prefetcher if watch is None else watch.noting(prefetcher)
            for window in plan.windows(epoch, progress.step):
                with watching(watch):
                    losses = accumulate_gradients(run, window, batches, prefetcher.fetch, memory_hints)
                    steps.apply_gradients(window, losses)
                    end_step()
                steps.finish(window)
                if not steps.are_left:
                    break
            if not steps.are_left:
                break
    run.batches.report_skipped(logger)
    steps.end(epoch)


@contextmanager
def measuring_steps(prepared: PreparedRun, bar: StepBar, steps: Steps) -> Iterator[Callable[[], None]]:
    """Time and profile the steps inside the block, and close what they use after it. Yield the function to call at the
    end of each."""
    run = prepared.run
    num_profiled = run.options.trackers.profile if run.processes.is_main else 0
    with ExitStack() as stack:
        # At exit torch waits five seconds for each worker that still runs, kills it and prints a traceback.
        stack.callback(run.batches.close)
        stack.enter_context(bar)
        profile = prepared.writer.names.of_profile()
        profile_step = stack.enter_context(profile_steps(num_profiled, profile, run.context.device))
        stack.enter_context(steps.updates.reported_at_end())
        stack.callback(run.times.watch_inputs(run.context.models.denoiser).remove)
        run.times.start()

        def end_step() -> None:
            run.times.end_step()
            profile_step()

        yield end_step


@contextmanager
def watching(watch: StepWatch | None) -> Iterator[None]:
    """Tell `watch` when the step in the block begins and ends."""
    if watch is not None:
        watch.before_step()
    yield
    if watch is not None:
        watch.after_step()


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
    run: Run,
    window: Window,
    batches: Iterator[Batch],
    fetch_next: Callable[[], None] = lambda: None,
    memory_hints: MemoryHints = lambda run, batch: [],
) -> Tensor:
    """Accumulate the gradients of this process's batches of a window. Return their losses.

    `fetch_next` is called when all work on a batch is queued on the device.
    """
    losses: list[Tensor] = []
    num_local = len(window.share(run.processes.rank, run.processes.count))
    for number, batch_index in enumerate(assign_batches(run, window)):
        batch = next(batches)
        # The true number of batches, which is smaller in the last window of an epoch; sd-scripts always divides by the
        # full one. A padding batch is divided by infinity, so its gradient is zero.
        size = len(window.batch_indices) if number < num_local else math.inf
        doing = f"computing step {window.step + 1}, forward and backward"
        shape, predicted = describe_shape(batch), partial(memory_hints, run, batch)
        batch_number = run.plan.batch_number(window.epoch, batch_index)
        with (
            explain_nondeterminism(partial(find_nondeterministic_module, run, batch, batch_number, window.step)),
            explain_out_of_memory(doing, run.options, run.context.device, shape, lambda: measure_sizes(run), predicted),
        ):
            losses.append(backward(run, batch, batch_number, size, window.step))
        fetch_next()
    return torch.stack(losses[:num_local]) if num_local else torch.zeros(0)


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
