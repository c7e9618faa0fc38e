"""Builds adapter, optimizer and schedule once without weights, before anything is read or encoded.

Otherwise a wrong network argument or a missing optimizer would only show after minutes of loading and caching.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from library.base.collector import freeze_imports
from library.base.errors import NotThere, about
from library.checkpoints.weights import to_meta_device
from library.options.training.optimizer import ScheduleOptions
from library.protocols import Architecture
from library.training.models.frozen_adapters import create_training_adapter
from library.training.models.network import create_on_meta_device
from library.training.models.requests import RequestedRun
from library.training.optimization.lr_schedules import Schedule, build_schedule
from library.training.optimization.optimizers import build_optimizer
from library.training.step.context import Models
from networks.core.protocol import adopt


def preflight(run: RequestedRun, max_train_steps: int) -> int:
    """Build the adapter, its optimizer and its schedule as the run will, on meta models, and discard them. Return the
    number of trained values, 0 if unknown.

    Raises UserError for any option of these that would end the run later. Third-party network modules are left out,
    because they may need real weights.
    """
    models = cache(partial(models_on_meta_device, run.arch))
    network, optimizer, scheduler = run.options.network, run.options.optimizer, run.options.schedule
    with mute_logging(), torch.random.fork_rng(devices=[]):
        if network.training_adapter:
            beside = create_training_adapter(network, run.arch, models())
            assert beside is not None
            beside.network.load_weights(beside.file)  # compares the shapes
        groups: list[dict[str, Any]] = [{"params": [], "lr": optimizer.learning_rate}]
        if run.module.is_ours:
            built_network = adopt(create_on_meta_device(network, run.module, models()))
            groups, _ = built_network.parameter_groups(
                network.text_encoder_lr, network.unet_lr, optimizer.learning_rate
            )
        # Some optimizers inspect their parameters when built, which fails on the meta device.
        dummy_groups = [{**group, "params": [nn.Parameter(torch.zeros(2, 2))]} for group in groups]
        built = build_optimizer(optimizer, dummy_groups)
        take_first_step(scheduler, build_schedule(scheduler, built, max_train_steps))
    return sum(p.numel() for group in groups for p in group["params"])


def take_first_step(options: ScheduleOptions, schedule: Schedule) -> None:
    """Step a third-party schedule once: StepLR, for example, divides by a step_size of 0 in its first step."""
    if not options.lr_scheduler_type:
        return
    try:
        schedule.step()
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        arguments = " ".join(options.lr_scheduler_args or []) or "no --lr_scheduler_args"
        raise about("--lr_scheduler_type")(f"{options.lr_scheduler_type} fails with {arguments}: {error}") from error


def models_on_meta_device(arch: Architecture) -> Models:
    """Return the models that get adapters, on the meta device."""
    loader = to_meta_device(arch.load)
    import_module("torch._dynamo")  # transformers' models import it too; torch 2.7 cannot under a device
    with torch.device("meta"), freeze_imports("models"):  # takes nearly all of this function's time
        try:
            encoders = loader.text_encoders()
        except NotThere:  # then captions are cached, and the encoders get no adapter
            encoders = []
        denoiser = loader.denoiser()
    return Models(denoiser, encoders, None, arch.view(encoders, denoiser))


@contextmanager
def mute_logging() -> Iterator[None]:
    """Disable logging; the run itself logs the same."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
