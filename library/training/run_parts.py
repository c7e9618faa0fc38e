"""The parts of one run, put together once in `training/run` and read everywhere else."""

from dataclasses import dataclass, field

import torch
from torch.optim import Optimizer

from library.data.training_data import TrainingBatches, TrainingData
from library.options.train import TrainOptions
from library.processes import Processes
from library.training.optimization.ema import WeightAverage
from library.training.optimization.lr_schedules import Schedule
from library.training.optimization.optimizers import BuiltOptimizer
from library.training.reporting.event_stream import Events
from library.training.reporting.step_events import NormMeter
from library.training.reporting.step_times import StepTimes
from library.training.step.accumulation import Plan
from library.training.step.context import StepContext
from library.training.sweep_record import SweepRecord
from networks.core.protocol import Multiplexer


@dataclass(frozen=True)
class Optimization:
    """The optimizer, its schedule, and the average of the weights."""

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
    """The training of one adapter."""

    options: TrainOptions
    processes: Processes
    data: TrainingData
    batches: TrainingBatches
    plan: Plan
    context: StepContext
    optimization: Optimization
    times: StepTimes = field(default_factory=StepTimes)
    events: Events = field(default_factory=Events)
    norms: NormMeter = field(default_factory=NormMeter)
    label: str = ""  # what the adapter is called in a sweep
    place: int = 0  # among them
    turns: Multiplexer | None = None  # says which of them act; None where there is one
    sweep: SweepRecord | None = None  # what they know of each other; None without a sweep
