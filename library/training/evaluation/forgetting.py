"""The forgetting probe: how the loss on images that are never trained changes (`is_forgetting_probe`)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from library.options.training.averaging import VALIDATION
from library.training.evaluation.measurement import Measurement
from library.training.evaluation.validation_loss import estimate_paired_difference
from library.training.evaluation.validation_record import Evaluation, ValidationRecord
from library.training.evaluation.validation_report import compare_with_first, finite, log_evaluation
from library.training.evaluation.without_side_effects import evaluating
from library.training.reporting import events
from library.training.reporting.trackers import Charts
from library.training.run_parts import Run

Kind = Literal["step", "epoch"]
BARS: Mapping[Kind, str] = {"step": "validation steps", "epoch": "epoch validation steps"}  # known to front ends


def evaluate(run: Run, measurement: Measurement, kind: Kind, step: int) -> Evaluation:
    """Measure the loss after `step`, without an effect on the training."""
    num_threads, evaluation_mode = run.options.dataset.max_data_loader_n_workers, evaluating(run, VALIDATION)
    return Evaluation(step, measurement.losses(run.context, run.processes, num_threads, BARS[kind], evaluation_mode))


@dataclass(frozen=True)
class ForgettingProbe:
    """The images of the probe and their losses so far."""

    run: Run
    charts: Charts
    measurement: Measurement
    record: ValidationRecord

    @property
    def is_on(self) -> bool:
        return bool(self.measurement.rows)

    def measure(self, kind: Kind, step: int) -> None:
        """Measure the probe after `step` once, and log and emit its loss."""
        run, record, measurement = self.run, self.record, self.measurement
        if record.measured_step == step:
            return
        evaluation = evaluate(run, measurement, kind, step)
        log_evaluation(evaluation, record, measurement.levels, measurement.labels, "forgetting probe")
        record.add(evaluation)
        record.keep_steps(lambda kept: kept in (0, step))
        run.events.emit(build_event(evaluation, record))
        if self.charts.are_on:
            self.charts.log_step({"loss/forgetting_probe": evaluation.mean}, step, run.plan.epoch_of(max(0, step - 1)))


def build_event(evaluation: Evaluation, record: ValidationRecord) -> events.Forgetting:
    zeros_N1 = torch.zeros_like(evaluation.losses_NL)[:, :1]
    error = estimate_paired_difference(evaluation.losses_NL, zeros_N1, record.images).standard_error
    compared = compare_with_first(record)
    return events.Forgetting(evaluation.step, evaluation.mean, finite(error), len(record.images), compared)
