"""Validation: when held-out images are measured, and its effects on the run.

`validation_record` stores the results, `validation_report` shows them. Letters: N rows, L noise levels.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.base.errors import error_in
from library.data.batches.validation_set import ValidationSet
from library.options.training.averaging import FILES, VALIDATION
from library.options.training.noise import NoiseOptions
from library.options.training.validation import ValidationOptions
from library.training.evaluation.choosing import choose_saved
from library.training.evaluation.forgetting import ForgettingProbe, Kind, evaluate
from library.training.evaluation.measurement import Measurement
from library.training.evaluation.validation_loss import noise_levels
from library.training.evaluation.validation_record import Evaluation, ValidationRecord
from library.training.evaluation.validation_report import build_event, detail_values, log_evaluation, measure_preference
from library.training.reporting import events
from library.training.reporting.progress import Progress
from library.training.reporting.trackers import Charts
from library.training.run_parts import Run
from library.training.saving.schedule import Schedule

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationSchedule:
    """When to validate; None means never."""

    at_first: bool
    every_n_steps: int | None
    every_n_epochs: int | None
    last_step: int

    @classmethod
    def build(cls, options: ValidationOptions, last_step: int) -> "ValidationSchedule":
        """Read the intervals: every epoch if none is given; with steps alone, also after the last step."""
        every_n_steps, every_n_epochs = options.validate_every_n_steps or None, options.validate_every_n_epochs or None
        if every_n_steps is None and every_n_epochs is None:
            every_n_epochs = 1
        return cls(options.validate_at_first, every_n_steps, every_n_epochs, last_step)

    def due(self, step: int, ended_epoch: int | None) -> Iterator[Kind]:
        """Yield what is scheduled after `step`, which may end an epoch."""
        is_epoch = ended_epoch is not None and self.every_n_epochs is not None and not ended_epoch % self.every_n_epochs
        is_step = self.every_n_steps is not None and not step % self.every_n_steps
        # The last step is measured in any case, because the final file is ranked by its loss. Adding every epoch to an
        # interval of steps took 39 % of the time of one run.
        if is_step or (self.every_n_epochs is None and step == self.last_step):
            yield "step"
        if is_epoch:
            yield "epoch"


def resolve_measurements(
    options: ValidationOptions, noise: NoiseOptions, held_out: ValidationSet, seed: int
) -> tuple[Measurement, Measurement]:
    """Return the measurements of the images held out for validation, and of the forgetting probe; `seed` is that of
    the run, which one of the options replaces."""
    seed = seed if options.validation_seed is None else options.validation_seed
    measurements = []
    for is_probe in (False, True):
        images = held_out.of_probe(is_probe)
        batch_indices = images.select_batches(options.max_validation_steps or None)
        measurements.append(Measurement(images, batch_indices, noise_levels(noise), seed))
    return measurements[0], measurements[1]


def warn_of_idle_options(options: ValidationOptions) -> None:
    """Warn of validation options that have no effect because no image is held out."""
    defaults = ValidationOptions.defaults()
    for name, value in options.flat().items():
        if name != "validation_split" and value != defaults[name] and value not in (None, 0):
            logger.warning("--%s has no effect: no image is set aside; --validation_split does that", name)


class Validation:
    """Measures held-out images on schedule; does nothing without any.

    Every evaluation of a run uses the same images, captions, noise and noise levels, so differences come from the
    weights alone. Training continues as if validation had not taken place.
    """

    def __init__(self, run: Run, charts: Charts) -> None:
        options = run.options.validation
        self._run, self._charts = run, charts
        self._schedule = ValidationSchedule.build(options, run.plan.max_train_steps)
        self._measurement, probe = resolve_measurements(
            options, run.context.arch.objective.noise, run.batches.validation, run.context.seed
        )
        self._save_schedule = Schedule.build(run.options.saving, run.plan.num_epochs)
        self._patience = options.early_stop_patience or None
        self.record = ValidationRecord(self._measurement.rows, self._measurement.fingerprint)
        self.probe = ForgettingProbe(run, charts, probe, ValidationRecord(probe.rows, probe.fingerprint))
        if not self.is_on and not self.probe.is_on and run.options.concepts is None:
            warn_of_idle_options(options)

    @property
    def is_on(self) -> bool:
        return bool(self._measurement.rows)

    @property
    def num_images(self) -> int:
        """The number of held-out images, measured or not."""
        return self._measurement.images.num_images

    def before_training(self, progress: Progress) -> bool:
        """Measure before training if requested, or what a resumed run had scheduled when it was interrupted.

        Return True if the loss is the lowest so far, like `after_step`.
        """
        if progress.step == 0 and self.probe.is_on and self._schedule.at_first:
            self.probe.measure("step", 0)
        if self.is_on and progress.step == 0 and self._schedule.at_first:
            evaluation = self._evaluate("step", 0)
            self._draw_charts(evaluation, {"loss/validation/step_average": evaluation.mean}, 0)
            return False  # an untrained adapter is not worth a file
        record = self.record if self.is_on else self.probe.record
        if record.is_resumed and progress.step and record.measured_step != progress.step:
            epochs, remainder = divmod(progress.step, self._run.plan.steps_per_epoch)
            return self.after_step(progress.step, epochs + bool(remainder), not remainder, progress.average.mean)
        return False

    def is_due(self, step: int) -> bool:
        """Return True if validation is scheduled after `step`, ignoring epochs."""
        return (self.is_on or self.probe.is_on) and any(self._schedule.due(step, None))

    def require_pause(self, first_step: int | None) -> None:
        """Raise UserError if a run that pauses after a validation from `first_step` on would have none before its last
        step."""
        plan = self._run.plan
        if first_step is None or first_step >= plan.max_train_steps:
            return
        positions = ((step, *divmod(step, plan.steps_per_epoch)) for step in range(first_step, plan.max_train_steps))
        due = (any(self._schedule.due(step, None if rest else epochs)) for step, epochs, rest in positions)
        if not (self.is_on and any(due)):
            raise error_in("--pause_after_step")(
                f"--pause_after_step {first_step}: no validation is scheduled from that step on",
                "set --validation_split, and --validate_every_n_steps or --validate_every_n_epochs",
            )

    def after_step(self, step: int, epoch: int, ends_epoch: bool, training_average: float) -> bool:
        """Measure if scheduled after `step` of `epoch`. Return True if the loss is the lowest so far.

        `training_average` is the running average of the training loss. Call before anything is saved, so that the
        step's state includes the result, and on all processes.
        """
        is_best = False
        for kind in self._schedule.due(step, epoch if ends_epoch else None) if self.probe.is_on else ():
            self.probe.measure(kind, step)
        for kind in self._schedule.due(step, epoch if ends_epoch else None) if self.is_on else ():
            best_before = self.record.best_loss
            evaluation = self._evaluate(kind, step)
            is_best = is_best or evaluation.mean < best_before
            values = {
                f"loss/validation/{kind}_average": evaluation.mean,
                f"loss/validation/{kind}_divergence": evaluation.mean - training_average,
            }
            self._draw_charts(evaluation, values, epoch, on_epochs=kind == "epoch")
        return is_best

    @property
    def stop_reason(self) -> str | None:
        """Why the run should end early; None to continue."""
        if self._patience is None or self.record.num_worse < self._patience:
            return None
        return (
            f"the last {self.record.num_worse} validations were worse than that after step {self.record.best_step} by "
            f"more than chance (--early_stop_patience {self._patience})"
        )

    def choose(self, files: Sequence[Path]) -> events.FileChoice | None:
        """Compare the saved files in the order of their steps; None without validation or without a choice."""
        averaging = self._run.options.averaging
        measures_what_is_saved = averaging.averages(FILES) == averaging.averages(VALIDATION)
        return choose_saved(files, self.record, measures_what_is_saved) if self.is_on else None

    def _evaluate(self, kind: Kind, step: int) -> Evaluation:
        """Measure after `step`, log and emit the result. Return the new evaluation, if there is one."""
        run, record, levels = self._run, self.record, self._measurement.levels
        if record.last is not None and record.last.step == step:  # a step that ends an epoch is scheduled twice
            return record.last
        evaluation = evaluate(run, self._measurement, kind, step)
        preference = self._summarise_preference(evaluation)
        log_evaluation(evaluation, record, levels, self._measurement.labels, preference=preference)
        record.add(evaluation)
        record.keep_steps(self._is_kept)
        run.events.emit(build_event(evaluation, record, levels, preference))
        return evaluation

    def _summarise_preference(self, evaluation: Evaluation) -> events.Preference | None:
        """Return an evaluation's result on held-out pairs; None without preference training."""
        return None if self._run.options.pairs.preference_loss is None else measure_preference(evaluation)

    def _is_kept(self, step: int) -> bool:
        """Return True if the losses after `step` are needed later: those of files, the first, the best and the last."""
        epochs, remainder = divmod(step, self._run.plan.steps_per_epoch)
        ends_saved_epoch = not remainder and self._save_schedule.saves_epoch(epochs)
        is_marked = step in (0, self.record.best_step, self.record.measured_step, self._run.plan.max_train_steps)
        return is_marked or ends_saved_epoch or self._save_schedule.saves_step(step)

    def _draw_charts(
        self, evaluation: Evaluation, values: Mapping[str, float], epoch: int, on_epochs: bool = False
    ) -> None:
        if self._charts.are_on:
            (self._charts.log_epoch if on_epochs else self._charts.log_step)(values, evaluation.step, epoch)
            levels, preference = self._measurement.levels, self._summarise_preference(evaluation)
            details = detail_values(evaluation, self.record, levels, preference)
            self._charts.log_step(details, evaluation.step, epoch)
