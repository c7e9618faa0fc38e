"""The parts of one run, put together once in `setup.py` and read everywhere else."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from library.data.batches.dataset import TrainingSet
from library.options.train import TrainOptions
from library.processes import Processes
from library.protocols import Architecture, LiveText
from library.training.optimization.lr_schedules import Schedule
from library.training.optimization.optimizers import BuiltOptimizer
from library.training.run.conditioning import CaptionMemo
from library.training.run.plan import Plan
from networks.core.protocol import AdoptedNetwork

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Models:
    """The frozen base model, each part in the dtype and on the device it trains on."""

    denoiser: nn.Module
    text_encoders: list[nn.Module]
    vae: nn.Module | None  # None once every latent is cached
    network_view: tuple[nn.Module | list[nn.Module], nn.Module]  # (text encoders, denoiser) as network modules see them


@dataclass(frozen=True)
class Run:
    """One training run."""

    options: TrainOptions
    arch: Architecture
    seed: int
    device: torch.device
    autocast: Autocast
    processes: Processes
    training_set: TrainingSet
    plan: Plan
    models: Models
    network: AdoptedNetwork
    trains_text_encoder: bool
    live_text: LiveText | None  # the text encoders in memory where the outputs of others are cached
    captions: CaptionMemo
    optimizer: BuiltOptimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler | None
    group_names: list[str]

    @property
    def torch_optimizer(self) -> Optimizer:
        """The optimizer itself."""
        return self.optimizer.optimizer
