"""The training loop."""

import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from library.training.evaluation.preview import Previews, epoch_event, step_event
from library.training.faults.interruption import Interruption
from library.training.faults.out_of_memory import explained, sizes_of
from library.training.optimization.nonfinite import NonFiniteGuard
from library.training.optimization.optimizers import effective_rates
from library.training.planning.advice import ways_out
from library.training.reporting.logs import Charts
from library.training.reporting.profile import profiled
from library.training.reporting.progress import Part, Progress
from library.training.reporting.report import (
    LimitedNorms,
    announce_epoch,
    bar_values,
    progress_bar,
    rate_values,
)
from library.training.reporting.step_times import StepTimes
from library.training.run.ahead import Ahead, copies_to
from library.training.run.plan import Window
from library.training.run.run import Run
from library.training.run.setup import Prepared
from library.training.run.sharding import order_of
from library.training.run.step import describe_shape, loss_of, start_batch
from library.training.run.told import Told
from library.training.run.told_steps import told_step
from library.training.run.update import Updates, wanted_norm_limit
from library.training.saving.checkpoints import Writer
from library.training.saving.state import StateManifest
from library.types import Batch

logger = logging.getLogger(__name__)


class StepWatch(Protocol):
    """Looks on at the steps."""

    def noting(self, batches: Iterator[Batch]) -> Iterator[Batch]: ...
    def before_step(self) -> None: ...
    def after_step(self) -> None: ...


def train(prepared: Prepared, interruption: Interruption, watch: StepWatch | None = None) -> None:
    """Train from where the run stands to the last step, or to the step in which the user interrupts.

    Either way the adapter is saved. `watch` is called around the arithmetic of each step. A run that goes on from a
    state first makes what was due at its step and was not done when the state was written.
    """
    run, progress, writer = prepared.run, prepared.progress, prepared.writer
    charts, previews, validation, resumed = prepared.charts, prepared.previews, prepared.validation, prepared.resumed
    plan, average, is_main = run.plan, progress.average, run.processes.is_main
    network, device = run.context.network, run.context.device
    guard, norm_limit = NonFiniteGuard(run), wanted_norm_limit(run)
    stops = ends = False
    epoch = plan.epoch_of(progress.step)
    if progress.step == 0:
        previews.before_training(interruption)
    if validation.before_training(progress):
        writer.save_best(progress.step, epoch)
    if resumed is not None:
        finish_step_of(resumed, run, progress, writer, previews, interruption)
    num_profiled = run.options.trackers.profile if is_main else 0
    bar = progress_bar(plan.max_train_steps, progress.step, is_main)
    updates = Updates(run, guard, norm_limit, partial(report_step, run, progress, charts, bar))
    with (
        bar,
        profiled(num_profiled, writer.names.of_profile(), device) as profile_step,
        updates.told_at_end(),
    ):
        run.times.start()
        is_open = progress.step < plan.max_train_steps and not validation.ends_run
        for epoch in plan.epochs(progress.step) if is_open else ():
            announce_epoch(epoch, plan.num_epochs)
            network.start_epoch(*run.context.models.network_view)
            ahead = batches_of(run, epoch, progress.step)
            batches = ahead if watch is None else watch.noting(ahead)
            for window in plan.windows(epoch, progress.step):
                if watch is not None:
                    watch.before_step()
                own_losses = accumulate_gradient(run, window, batches, ahead.fetch)
                losses, stops = run.processes.exchange(
                    network.trainable_parameters(),
                    own_losses,
                    len(window.places),
                    interruption.is_requested,
                    order_of(run),
                )
                updates.tell()
                progress.is_moving = True
                with explained("the optimizer moved the weights", run.options, device, "", lambda: sizes_of(run)):
                    with run.times.stage("optimizer"):
                        updates.take(window, losses)
                run.times.end_step()
                profile_step()
                if watch is not None:
                    watch.after_step()
                progress.advance()
                is_last = progress.step >= plan.max_train_steps
                is_due = writer.schedule.saves_step(progress.step) or previews.are_due(progress.step)
                is_due = is_due or validation.is_due(progress.step) or window.ends_epoch or is_last or stops
                if is_due or not updates.tells_late:
                    updates.tell()
                if not stops:
                    with run.times.stage("validation"):
                        is_best = validation.after_step(
                            progress.step, epoch, window.ends_epoch or is_last, average.mean
                        )
                    if is_best:
                        with run.times.stage("saving"):
                            writer.save_best(progress.step, epoch)
                finish_step(run.times, progress, epoch, writer, previews, interruption)
                ends = stops or validation.ends_run
                if ends:
                    break
            if ends and progress.step % plan.steps_per_epoch != 0:
                break
            if charts.are_on:
                charts.log_epoch({"loss/epoch_average": average.mean}, progress.step, epoch)
            finish_epoch(run.times, progress, epoch, writer, previews, interruption)
            if ends:
                break
    guard.report(progress.step)
    run.training_set.report_skipped(logger)
    if progress.step >= plan.max_train_steps:
        writer.save_end(progress, plan.num_epochs)
    elif validation.ends_run:
        logger.info("the run ends after step %d: %s", progress.step, validation.why_it_ends)
        writer.save_end(progress, epoch)
    else:
        writer.save_interrupted(progress, epoch)


def finish_step(
    times: StepTimes, progress: Progress, epoch: int, writer: Writer, previews: Previews, interruption: Interruption
) -> None:
    """Save and draw what is due after a step and not done; weights are safe before pictures take their time."""
    with times.stage("saving"):
        writer.save_after_step(progress, epoch)
    with times.stage("previews"):
        if "step previews" not in progress.done and previews.after_step(progress.step, epoch, interruption):
            progress.done.add("step previews")


def finish_epoch(
    times: StepTimes, progress: Progress, epoch: int, writer: Writer, previews: Previews, interruption: Interruption
) -> None:
    """The same after an epoch, which the end of the run may have cut short."""
    with times.stage("saving"):
        writer.save_after_epoch(progress, epoch)
    with times.stage("previews"):
        if "epoch previews" not in progress.done and previews.after_epoch(progress.step, epoch, interruption):
            progress.done.add("epoch previews")


def finish_step_of(
    state: StateManifest, run: Run, progress: Progress, writer: Writer, previews: Previews, interruption: Interruption
) -> None:
    """Make what was due at the step of a state and was not done when the run was stopped.

    Pictures are drawn after the state is written, so it cannot know of them: those on disk that are not older count.
    """
    finished_epochs, rest = divmod(progress.step, run.plan.steps_per_epoch)
    epoch = finished_epochs + bool(rest)
    ends_epoch = not rest or progress.step >= run.plan.max_train_steps
    drawn: dict[Part, str] = {"step previews": step_event(progress.step), "epoch previews": epoch_event(epoch)}
    for part, event in drawn.items():
        is_drawn = previews.are_drawn(event, state.written_at)  # of the main process's prompts; others have none
        if run.processes.share(f"drawn {part}", "yes" if is_drawn else "no") == "yes":
            progress.done.add(part)
    finish_step(run.times, progress, epoch, writer, previews, interruption)
    if ends_epoch:
        finish_epoch(run.times, progress, epoch, writer, previews, interruption)


def batches_of(run: Run, epoch: int, first_step: int) -> Ahead:
    """This process's batches of an epoch, in order, from the one after `first_step` on; no other is read."""
    dataset, cache = run.options.dataset, run.context.arch.text_cache
    windows = run.plan.windows(epoch, first_step)
    places = [place for window in windows for place in passes_of(run, window)]
    batches = run.training_set.batches(
        epoch,
        places,
        partial(run.plan.step_of, epoch),
        dataset.max_data_loader_n_workers,
        dataset.persistent_data_loader_workers,
    )
    copies = copies_to(run.context.device, () if cache is None else cache.on_host)
    return Ahead(batches, len(places), copies, run.times)


def accumulate_gradient(
    run: Run, window: Window, batches: Iterator[Batch], fetch_next: Callable[[], None] = lambda: None
) -> Tensor:
    """Add the gradients of this process's share of a window; gives the losses of its batches.

    `fetch_next` is called once the device has got its work on a batch.
    """
    losses = []
    num_own = len(window.share(run.processes.rank, run.processes.count))
    for number, place in enumerate(passes_of(run, window)):
        batch = next(batches)
        # The gradient of a loss that is divided by infinity is zero.
        size = len(window.places) if number < num_own else math.inf
        doing = f"computing step {window.step + 1}, forward and backward"
        shape, predicted = describe_shape(batch), partial(ways_out, run, batch)
        with explained(doing, run.options, run.context.device, shape, lambda: sizes_of(run), predicted):
            loss = backward(run, batch, run.plan.batch_number(window.epoch, place), size, window.step)
        losses.append(loss)
        fetch_next()
    return torch.stack(losses[:num_own]) if num_own else torch.zeros(0)


def passes_of(run: Run, window: Window) -> list[int]:
    """The places that this process computes for a window: its share, and in step with others a stand-in."""
    processes = run.processes
    share = [*window.share(processes.rank, processes.count)]
    stand_in = None
    if run.context.models.spread is not None:
        stand_in = window.stand_in(processes.rank, processes.count)
    return share if stand_in is None else [*share, stand_in]


def backward(run: Run, batch: Batch, batch_number: int, window_size: float, step: int) -> Tensor:
    """Add the gradient of one batch; gives its loss."""
    if run.fixed is not None:
        with run.times.counted(batch), run.times.stage("forward"):  # and backward, which is one with it
            start_batch(run.context, batch_number, step)
            return run.fixed.gradients(batch, batch_number, int(window_size))
    with run.times.counted(batch) as turn_back:
        with run.times.stage("forward"):
            start_batch(run.context, batch_number, step)
            loss = loss_of(run.context, batch, batch_number)
            scaled = loss / window_size
        turn_back()
        with run.times.stage("backward"):
            torch.autograd.backward(
                scaled if run.optimization.scaler is None else run.optimization.scaler.scale(scaled)
            )
    return loss.detach().float()


def report_step(run: Run, progress: Progress, charts: Charts, bar: "tqdm[None]", told: Told) -> None:
    """Put the losses of a step into the running average, the events, the bar, and the charts: there a point a batch.

    The average leaves out losses that are not finite: the step that they belong to moved nothing.
    """
    window = told.window
    for place, loss in zip(window.places, told.losses, strict=True):
        if math.isfinite(loss):
            progress.average.add(place, loss)
        if charts.are_on:
            step = window.step + 1 if place == window.places[-1] else window.step
            values = step_values(run, loss, progress.average.mean, told.rates, told.limited)
            charts.log_step(values, step, window.epoch)
    if run.events.is_on:
        run.events.emit(told_step(told, progress.average.mean, run.optimization.group_names, run.norms, run.times))
    bar.update(1)
    bar.set_postfix(bar_values(progress.average.mean, told.limited))


def step_values(
    run: Run, loss: float, average: float, rates: list[float], norms: LimitedNorms | None
) -> dict[str, float]:
    """What the charts show of a batch."""
    effective = effective_rates(run.optimization.optimizer, run.optimization.built.name)
    is_first_text_encoder = not run.options.network.network_train_unet_only
    values = rate_values(rates, run.optimization.group_names, effective, is_first_text_encoder)
    if effective is not None and "prodigyplus" in run.optimization.built.name.lower():
        values["lr/d*lr"] = effective[0]
    limited = {} if norms is None else norms.chart_values()
    return {**run.times.chart_values(), **limited, "loss/current": loss, "loss/average": average, **values}
