"""The per-adapter work of a run: updates, validation, checkpoints and previews."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from library.errors import UserError
from library.gradient_exchange import Order, exchange_gradients
from library.training.evaluation.preview import Previews, epoch_event, step_event
from library.training.evaluation.validation import Validation
from library.training.failures.interruption import Interruption
from library.training.failures.nonfinite import NonFiniteError, NonFiniteGuard, advice, save_last_good
from library.training.failures.out_of_memory import explain_out_of_memory, measure_sizes
from library.training.loop.update import Updates, resolve_norm_limit
from library.training.optimization.optimizers import effective_rates
from library.training.reporting.console_lines import LimitedNorms, StepBar, bar_values, rate_values
from library.training.reporting.log_prefix import log_prefix
from library.training.reporting.progress import Part, Progress
from library.training.reporting.step_events import StepResult, build_step_event
from library.training.reporting.trackers import Charts
from library.training.run_parts import Run
from library.training.saving.checkpoints import NonFiniteWeights, SavedElsewhere, Writer, weights_are_finite
from library.training.saving.rescue import NotWrittenError
from library.training.saving.state import StateManifest
from library.training.step.accumulation import Window
from library.training.sweep_record import NOT_FINITE, Ended

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRun:
    """One adapter that is ready to be trained."""

    run: Run
    progress: Progress
    writer: Writer
    charts: Charts
    previews: Previews
    validation: Validation
    resumed: StateManifest | None  # the state, if the run goes on at its step


class AdapterRun:
    """One adapter of a run. The loop computes the gradients and calls the methods step by step."""

    def __init__(self, prepared: PreparedRun, interruption: Interruption, bar: StepBar) -> None:
        self.prepared, self._interruption = prepared, interruption
        self.run, self.progress, self.validation = prepared.run, prepared.progress, prepared.validation
        self.failure: UserError | None = None  # what kept the files of the end from their place
        self.lacks_previews = False  # a signal came before the previews of the current step were complete
        self._guard = NonFiniteGuard(self.run)
        report = partial(report_step, self.run, self.progress, prepared.charts, bar)
        with self.prefix_logs():
            self.updates = Updates(self.run, self._guard, resolve_norm_limit(self.run), report)

    def prefix_logs(self) -> AbstractContextManager[None]:
        """Prefix log lines in the block with the adapter's name, where several train in one run."""
        return log_prefix(self.run.label)

    @contextmanager
    def ending_alone(self, has_others: bool) -> Iterator[None]:
        """On a non-finite loss inside the block, save and end this adapter if `has_others`; else the error
        propagates."""
        with self.prefix_logs():
            try:
                with save_last_good(self.prepared.writer):
                    yield
            except NonFiniteError as error:
                if not has_others:
                    raise
                self.note_end(NOT_FINITE)
                logger.error("%s. The other adapters go on", error)

    def begin(self) -> None:
        """Do the work that precedes the first step."""
        prepared, progress, epoch = self.prepared, self.progress, self.run.plan.epoch_of(self.progress.step)
        if progress.step == 0 and not prepared.previews.before_training(self._interruption):
            self.lacks_previews = True
            return
        if prepared.validation.before_training(progress):
            prepared.writer.save_best(progress.step, epoch)
        if prepared.resumed is not None:
            self._complete_resumed_step(prepared.resumed)

    def start_epoch(self) -> None:
        self.run.context.network.start_epoch(*self.run.context.models.network_view)

    def apply_gradients(self, window: Window, local_losses: Tensor, wants_stop: bool) -> bool:
        """Apply the gradients of `window`. Return True if any process requests a stop.

        `local_losses` are the losses of this process's batches. Raises NonFiniteError if the adapter cannot continue.
        """
        run, device = self.run, self.run.context.device
        parameters = run.context.network.trainable_parameters()
        num_losses, sharded = len(window.batch_indices), run.context.models.sharded
        order = None if sharded is None else Order(sharded.digest, sharded.group_size)
        losses, stops = exchange_gradients(run.processes, parameters, local_losses, num_losses, wants_stop, order)
        # The previous step is judged only now, when the device has this step's gradients queued, and before this step
        # uses the learning rate that follows from it.
        self.updates.report()
        # Cleared by `advance`: an error in between leaves weights that belong to no step, which get no state.
        self.progress.is_updating = True
        with explain_out_of_memory(
            "the optimizer moved the weights", run.options, device, "", lambda: measure_sizes(run)
        ):
            with run.times.stage("optimizer"):
                self.updates.apply(window, losses)
        return stops

    def finish_step(self, window: Window, stops: bool) -> None:
        """Count the step, then validate, save and draw as scheduled. Raises NonFiniteError if the weights of an
        adapter of a sweep are damaged."""
        prepared, progress, run = self.prepared, self.progress, self.run
        validation, writer, plan = prepared.validation, prepared.writer, self.run.plan
        progress.advance()
        is_last = progress.step >= plan.max_train_steps
        if stops and is_last:  # training is complete, but whoever sent the signal may not wait for validation
            stops = False
            writer.save_weights_of_end(progress.step, window.epoch)
        is_due = writer.schedule.saves_step(progress.step) or prepared.previews.are_due(progress.step)
        is_due = is_due or validation.is_due(progress.step) or window.ends_epoch or is_last or stops
        # The step's result decides the learning rate and the running average, which a state stores and previews,
        # validation and files are recorded with.
        if is_due or not self.updates.reports_late:
            self.updates.report()
        # The writer would refuse these weights and end the run. Every process has them, but only one writes.
        if is_due and run.sweep is not None and not weights_are_finite(run.context.network.module):
            raise NonFiniteError(
                f"the adapter has weights that are NaN or infinite after step {progress.step}: {advice(run)}", None
            )
        if not stops:
            with run.times.stage("validation"):
                ends_epoch = window.ends_epoch or is_last
                is_best = validation.after_step(progress.step, window.epoch, ends_epoch, progress.average.mean)
            if is_best:
                with run.times.stage("saving"):
                    writer.save_best(progress.step, window.epoch)
        self._after_step(window.epoch)
        is_cut = is_last and validation.stop_reason is None  # the run ends here in mid-epoch
        if progress.step % plan.steps_per_epoch == 0 or is_cut:
            if prepared.charts.are_on:
                average = progress.average.mean
                prepared.charts.log_epoch({"loss/epoch_average": average}, progress.step, window.epoch)
            self._after_epoch(window.epoch)

    def note_end(self, why: str) -> None:
        """Record that this adapter ends before the run does."""
        self.progress.ended = why
        if self.run.sweep is not None:
            self.run.sweep.ended[self.run.label] = Ended(self.progress.step, why, self.validation.record.last_losses())

    def drop(self, epoch: int) -> None:
        """End the adapter early because another one is significantly better."""
        self.note_end("another one was significantly better (--sweep_stop_after)")
        logger.info("ends after step %d: %s", self.progress.step, self.progress.ended)
        with self._keeping_failure():
            self.prepared.writer.save_end(self.progress, epoch)

    def end(self, epoch: int) -> None:
        """Save the final weights and states and log a summary. An error is kept as `failure`."""
        with self._keeping_failure():
            self._save_end(epoch)

    @contextmanager
    def _keeping_failure(self) -> Iterator[None]:
        """Keep an error of saving, so that the other adapters of a sweep are trained and saved all the same."""
        try:
            yield
        except (NonFiniteError, NonFiniteWeights, NotWrittenError, SavedElsewhere) as error:
            self.failure = error
            if self.run.sweep is not None:
                logger.error("%s", error)

    def _save_end(self, epoch: int) -> None:
        progress, writer, validation = self.progress, self.prepared.writer, self.prepared.validation
        self._guard.report(progress.step)
        if progress.step >= self.run.plan.max_train_steps:
            writer.save_end(progress, self.run.plan.num_epochs, is_complete=not self.lacks_previews)
        elif validation.stop_reason is not None:
            self.note_end(validation.stop_reason)
            logger.info("the run ends after step %d: %s", progress.step, progress.ended)
            writer.save_end(progress, epoch)
        elif progress.step == 0:
            logger.warning("stopped before the first step: nothing was trained, nothing to save")
        else:
            writer.save_interrupted(progress, epoch)

    def _after_step(self, epoch: int) -> None:
        """Save and draw what is scheduled after a step and not done yet."""
        self._save_and_draw(
            "step previews", epoch, self.prepared.writer.save_after_step, self.prepared.previews.after_step
        )

    def _after_epoch(self, epoch: int) -> None:
        """Save and draw what is scheduled after an epoch, which the end of the run may have shortened."""
        prepared = self.prepared
        self._save_and_draw("epoch previews", epoch, prepared.writer.save_after_epoch, prepared.previews.after_epoch)

    def _save_and_draw(
        self,
        part: Part,
        epoch: int,
        save: Callable[[Progress, int], None],
        draw: Callable[[int, int, Interruption], bool],
    ) -> None:
        # Weights are safe before images take their time.
        times, progress = self.run.times, self.progress
        with times.stage("saving"):
            save(progress, epoch)
        with times.stage("previews"):
            if part in progress.done:
                return
            if draw(progress.step, epoch, self._interruption):
                progress.done.add(part)
            else:
                self.lacks_previews = True

    def _complete_resumed_step(self, state: StateManifest) -> None:
        """Do what was due at the step of a state and was not done when the run was stopped.

        Images are drawn after the state is written, so it cannot know of them: those on disk that are not older
        count.
        """
        run, progress, previews = self.run, self.progress, self.prepared.previews
        finished_epochs, steps_into_epoch = divmod(progress.step, run.plan.steps_per_epoch)
        epoch = finished_epochs + bool(steps_into_epoch)
        preview_events: dict[Part, str] = {
            "step previews": step_event(progress.step),
            "epoch previews": epoch_event(epoch),
        }
        # Processes must agree on what is left to draw, because with a sharded model all of them take part.
        for part, event in preview_events.items():
            is_drawn = previews.are_drawn(event, state.written_at)  # other ranks have no prompts
            if run.processes.share(f"drawn {part} {run.label}", "yes" if is_drawn else "no") == "yes":
                progress.done.add(part)
        self._after_step(epoch)
        if not steps_into_epoch or progress.step >= run.plan.max_train_steps:
            self._after_epoch(epoch)


def report_step(run: Run, progress: Progress, charts: Charts, bar: StepBar, result: StepResult) -> None:
    """Report a step's losses to the running average, events, progress bar and charts (one point per batch).

    Non-finite losses are left out of the average, because their step was skipped.
    """
    window = result.window
    for batch_index, loss in zip(window.batch_indices, result.losses, strict=True):
        if math.isfinite(loss):
            progress.average.add(batch_index, loss)
        if charts.are_on:
            # The x values of sd-scripts: one point per batch, under the count of steps that are finished after it.
            step = window.step + 1 if batch_index == window.batch_indices[-1] else window.step
            values = step_values(run, loss, progress.average.mean, result.rates, result.limited)
            charts.log_step(values, step, window.epoch)
    if run.events.is_on:
        run.events.emit(
            build_step_event(result, progress.average.mean, run.optimization.group_names, run.norms, run.times)
        )
    bar.show(window.step + 1, bar_values(progress.average.mean, result.limited), run.label)


def step_values(
    run: Run, loss: float, average: float, rates: list[float], norms: LimitedNorms | None
) -> dict[str, float]:
    effective = effective_rates(run.optimization.optimizer, run.optimization.built.name)
    is_first_text_encoder = not run.options.network.network_train_unet_only
    values = rate_values(rates, run.optimization.group_names, effective, is_first_text_encoder)
    # sd-scripts charts the first group's rate of ProdigyPlus under this name.
    if effective is not None and "prodigyplus" in run.optimization.built.name.lower():
        values["lr/d*lr"] = effective[0]
    norm_values = {} if norms is None else norms.chart_values()
    return {**run.times.chart_values(), **norm_values, "loss/current": loss, "loss/average": average, **values}
