"""The work of a run around its gradients: updates, validation, checkpoints and previews."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from library.processes.gradient_exchange import Order, exchange_gradients
from library.training.evaluation.preview import Previews, epoch_event, step_event
from library.training.evaluation.validation import Validation
from library.training.failures.interruption import Interruption
from library.training.failures.nonfinite import NonFiniteGuard
from library.training.failures.out_of_memory import explain_out_of_memory, measure_sizes
from library.training.loop.requests import DRAW_NOW, SAVE_NOW, Requests, take_request
from library.training.loop.update import Updates, resolve_norm_limit
from library.training.optimization.optimizers import effective_rates
from library.training.reporting.console_lines import LimitedNorms, StepBar, bar_values, rate_values
from library.training.reporting.progress import Part, Progress
from library.training.reporting.step_events import StepResult, build_step_event
from library.training.reporting.trackers import Charts
from library.training.run_parts import Run
from library.training.saving.checkpoints import Writer
from library.training.saving.state import StateManifest
from library.training.step.accumulation import Window

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRun:
    """A run that is ready to be trained, with what saves, draws and measures it."""

    run: Run
    progress: Progress
    writer: Writer
    charts: Charts
    previews: Previews
    validation: Validation
    resumed: StateManifest | None  # the state, if the run goes on at its step

    @property
    def is_over(self) -> bool:
        """True if no step is left, or if validation has ended the run."""
        return self.progress.step >= self.run.plan.max_train_steps or bool(self.progress.ended)


class Steps:
    """The steps of a run. The loop computes the gradients and calls the methods step by step."""

    def __init__(self, prepared: PreparedRun, interruption: Interruption, bar: StepBar) -> None:
        self._prepared, self._interruption = prepared, interruption
        self._run, self._progress, self._validation = prepared.run, prepared.progress, prepared.validation
        self._stops = False  # a process asked for the end, or previews were cut off, which only this step can draw
        self._lacks_previews = False  # a signal came before the previews of the current step were complete
        self._requests = Requests()
        self._guard = NonFiniteGuard(self._run)
        report = partial(report_step, self._run, self._progress, prepared.charts, bar)
        self.updates = Updates(self._run, self._guard, resolve_norm_limit(self._run), report)

    @property
    def are_left(self) -> bool:
        """True if another step is to be trained."""
        is_stopped = self._stops or self._validation.stop_reason is not None
        return not is_stopped and self._progress.step < self._run.plan.max_train_steps

    def begin(self) -> None:
        """Do the work that precedes the first step."""
        prepared, progress = self._prepared, self._progress
        if progress.step == 0 and not prepared.previews.before_training(self._interruption):
            self._note_lacking_previews()
            return
        if prepared.validation.before_training(progress):
            prepared.writer.save_best(progress.step, self._run.plan.epoch_of(progress.step))
        if prepared.resumed is not None:
            self._complete_resumed_step(prepared.resumed)

    def start_epoch(self) -> None:
        self._run.context.network.start_epoch(*self._run.context.models.network_view)

    def apply_gradients(self, window: Window, local_losses: Tensor) -> None:
        """Apply the gradients of `window`, and hear what any process is asked for.

        `local_losses` are the losses of this process's batches. Raises NonFiniteError if the run cannot continue.
        """
        run, device = self._run, self._run.context.device
        parameters = run.context.network.trainable_parameters()
        num_losses, sharded = len(window.batch_indices), run.context.models.sharded
        order = None if sharded is None else Order(sharded.digest, sharded.group_size)
        wishes = [self._interruption.is_requested, *self._take_requests()]
        losses, wishes = exchange_gradients(run.processes, parameters, local_losses, num_losses, wishes, order)
        # The previous step is judged only now, when the device has this step's gradients queued, and before this step
        # uses the learning rate that follows from it.
        self.updates.report()
        # Cleared by `advance`: an error in between leaves weights that belong to no step, which get no state.
        self._progress.is_updating = True
        doing = "the optimizer moved the weights"
        with (
            explain_out_of_memory(doing, run.options, device, "", lambda: measure_sizes(run)),
            run.times.stage("optimizer"),
        ):
            self.updates.apply(window, losses)
        self._stops, self._requests = wishes[0], Requests(*wishes[1:])

    def _take_requests(self) -> list[bool]:
        names = self._prepared.writer.names
        is_main = self._run.processes.is_main
        return [is_main and take_request(names.path_with_ending(ending)) for ending in (DRAW_NOW, SAVE_NOW)]

    def finish(self, window: Window) -> None:
        """Count the step, then validate, save and draw as scheduled."""
        prepared, progress, plan = self._prepared, self._progress, self._run.plan
        progress.advance()
        is_last = progress.step >= plan.max_train_steps
        stops = self._stops
        if stops and is_last:  # training is complete, but whoever sent the signal may not wait for validation
            stops = False
            prepared.writer.save_weights_of_end(progress.step, window.epoch)
        saves_by_clock = prepared.writer.timed.is_due
        is_due = self._has_scheduled(progress.step) or saves_by_clock or bool(self._requests)
        is_due = is_due or window.ends_epoch or is_last or stops
        # The step's result decides the learning rate and the running average, which a state stores and previews,
        # validation and files are recorded with.
        if is_due or not self.updates.reports_late:
            self.updates.report()
        if not stops:
            self._validate(window, window.ends_epoch or is_last)
            pause = self._run.options.state.pause_after_step
            if pause is not None and self._validation.record.measured_step == progress.step >= pause and not is_last:
                self._stops = True
        self._after_step(window.epoch)
        self._answer_requests(window.epoch)
        is_cut = is_last and self._validation.stop_reason is None  # the run ends here in mid-epoch
        if progress.step % plan.steps_per_epoch == 0 or is_cut:
            if prepared.charts.are_on:
                average = progress.average.mean
                prepared.charts.log_epoch({"loss/epoch_average": average}, progress.step, window.epoch)
            self._after_epoch(window.epoch)
        if saves_by_clock:
            self._save_timed_state(window.epoch)

    def _has_scheduled(self, step: int) -> bool:
        """Return True if the run saves, draws or validates after a step, ignoring epochs."""
        saves, draws = self._prepared.writer.schedule.saves_step(step), self._prepared.previews.are_due(step)
        return saves or draws or self._validation.is_due(step)

    def _answer_requests(self, epoch: int) -> None:
        """Save and draw what a request file asks for and the schedule has not given yet."""
        prepared, progress = self._prepared, self._progress
        if self._requests.saves:
            with self._run.times.stage("saving"):
                prepared.writer.save_now(progress, epoch)
        if self._requests.draws:
            with self._run.times.stage("previews"):
                # Like `_stops` the answer is that of all processes.
                self._stops |= not prepared.previews.draw_now(progress.step, epoch, self._interruption)

    def _save_timed_state(self, epoch: int) -> None:
        """Save a state after all other work of the step, so that a run that goes on from it does nothing twice; `end`
        saves what a stop or the last step leaves."""
        if self.are_left:
            with self._run.times.stage("saving"):
                self._prepared.writer.save_timed_state(self._progress, epoch)

    def end(self, epoch: int) -> None:
        """Save the final weights and state, and log a summary. Raises what keeps them from their place."""
        progress, writer, validation = self._progress, self._prepared.writer, self._validation
        self._take_requests()  # too late: no later run is meant
        self._guard.report(progress.step)
        if progress.step >= self._run.plan.max_train_steps:
            writer.save_end(progress, self._run.plan.num_epochs, is_complete=not self._lacks_previews)
        elif validation.stop_reason is not None:
            progress.ended, self._run.events.cause = validation.stop_reason, "early stopping"
            logger.info("the run ends after step %d: %s", progress.step, progress.ended)
            writer.save_end(progress, epoch)
        elif progress.step == 0:
            logger.warning("stopped before the first step: nothing was trained, nothing to save")
        else:
            writer.save_interrupted(progress, epoch)

    def _validate(self, window: Window, ends_epoch: bool) -> None:
        times, progress = self._run.times, self._progress
        with times.stage("validation"):
            is_best = self._validation.after_step(progress.step, window.epoch, ends_epoch, progress.average.mean)
        if is_best:
            with times.stage("saving"):
                self._prepared.writer.save_best(progress.step, window.epoch)

    def _after_step(self, epoch: int) -> None:
        """Save and draw what is scheduled after a step and not done yet."""
        prepared = self._prepared
        self._save_and_draw("step previews", epoch, prepared.writer.save_after_step, prepared.previews.after_step)

    def _after_epoch(self, epoch: int) -> None:
        """Save and draw what is scheduled after an epoch, which the end of the run may have shortened."""
        prepared = self._prepared
        self._save_and_draw("epoch previews", epoch, prepared.writer.save_after_epoch, prepared.previews.after_epoch)

    def _save_and_draw(
        self,
        part: Part,
        epoch: int,
        save: Callable[[Progress, int], None],
        draw: Callable[[int, int, Interruption], bool],
    ) -> None:
        # Weights are safe before images take their time.
        times, progress = self._run.times, self._progress
        with times.stage("saving"):
            save(progress, epoch)
        with times.stage("previews"):
            if part in progress.done:
                return
            if draw(progress.step, epoch, self._interruption):
                progress.done.add(part)
            else:
                self._note_lacking_previews()

    def _note_lacking_previews(self) -> None:
        # Only the weights of this step can draw the previews that a signal cut off.
        self._lacks_previews = self._stops = True

    def _complete_resumed_step(self, state: StateManifest) -> None:
        """Do what was due at the step of a state and was not done when the run was stopped.

        Images are drawn after the state is written, so it cannot know of them: those on disk that are not older
        count.
        """
        run, progress, previews = self._run, self._progress, self._prepared.previews
        finished_epochs, steps_into_epoch = divmod(progress.step, run.plan.steps_per_epoch)
        epoch = finished_epochs + bool(steps_into_epoch)
        preview_events: dict[Part, str] = {
            "step previews": step_event(progress.step),
            "epoch previews": epoch_event(epoch),
        }
        # Processes must agree on what is left to draw, because with a sharded model all of them take part.
        for part, event in preview_events.items():
            is_drawn = previews.are_drawn(event, state.written_at)  # other ranks have no prompts
            if run.processes.share(f"drawn {part}", "yes" if is_drawn else "no") == "yes":
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
    bar.show(window.step + 1, bar_values(progress.average.mean, result.limited))


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
