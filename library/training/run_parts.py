"""The parts of a run, built once in `training/run`."""

from dataclasses import dataclass, field

import torch
from torch.optim import Optimizer

from library.data.training_data import TrainingBatches, TrainingData
from library.options.train import TrainOptions
from library.processes.process_group import Processes
from library.training.optimization.ema import WeightAverage
from library.training.optimization.lr_schedules import Schedule
from library.training.optimization.optimizers import BuiltOptimizer
from library.training.reporting.event_stream import Events
from library.training.reporting.step_events import NormMeter
from library.training.reporting.step_times import StepTimes
from library.training.step.accumulation import StepPlan
from library.training.step.context import StepContext


@dataclass(frozen=True)
class Optimization:
    """Optimizer, schedule, and moving average of the weights."""

    built: BuiltOptimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler | None  # fp16 only
    group_names: list[str]  # of the optimizer's groups, for the charts
    average: WeightAverage | None = None

    @property
    def optimizer(self) -> Optimizer:
        return self.built.optimizer


@dataclass(frozen=True)
class Run:
    """The parts that a step, a validation and a preview compute with."""

    options: TrainOptions
    processes: Processes
    data: TrainingData
    batches: TrainingBatches
    plan: StepPlan
    context: StepContext
    optimization: Optimization
    times: StepTimes = field(default_factory=StepTimes)
    events: Events = field(default_factory=Events)
    norms: NormMeter = field(default_factory=NormMeter)
