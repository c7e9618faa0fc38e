"""The third stage of the set-up: what moves the weights."""

import logging
from typing import Any

import torch

from library.errors import UserError
from library.options.train import TrainOptions
from library.training.models.block_running import trains_text_encoders
from library.training.optimization.ema import WeightAverage
from library.training.optimization.lr_schedules import build_schedule
from library.training.optimization.optimizers import build_optimizer
from library.training.run_parts import Optimization
from library.training.step.context import Models
from networks.core.protocol import AdoptedNetwork

logger = logging.getLogger(__name__)


def build_optimization(
    options: TrainOptions, network: AdoptedNetwork, models: Models, max_train_steps: int, device: torch.device
) -> Optimization:
    """Optimizer, schedule and gradient scaler for the adapter's parameters, where they lie by now.

    After the adapter has moved to its device and dtype: an optimizer holds on to the tensors that it is given.
    """
    groups, names = network.parameter_groups(
        options.network.text_encoder_lr, options.network.unet_lr, options.optimizer.learning_rate
    )
    warn_of_idle_rate(options, network)
    optimizer = build_optimizer(options.optimizer, groups)
    schedule = build_schedule(options.schedule, optimizer, max_train_steps)
    network.prepare_gradients(*models.network_view)
    scaler = gradient_scaler(options, device)
    average = build_average(options, network, optimizer.is_schedule_free)
    return Optimization(optimizer, schedule, scaler, group_names(names, len(groups), options), average)


def warn_of_idle_rate(options: TrainOptions, network: AdoptedNetwork) -> None:
    """Say so where --text_encoder_lr is given and, although the text encoders are not left out, none has an adapter."""
    if not any(options.network.text_encoder_lr or ()) or options.network.network_train_unet_only:
        return
    names = [name for name, _ in network.module.named_parameters()]
    is_kohyas = any(name.startswith("lora_unet") for name in names)
    if is_kohyas and not any(name.startswith("lora_te") for name in names):
        logger.warning("--text_encoder_lr has no effect: no text encoder has an adapter")


def build_average(options: TrainOptions, network: AdoptedNetwork, is_schedule_free: bool) -> WeightAverage | None:
    """The moving average of --ema_decay. Raises UserError beside an optimizer that averages by itself."""
    wanted = options.averaging
    if not wanted.ema_decay:
        return None
    if is_schedule_free:
        raise UserError(
            f"--ema_decay {wanted.ema_decay} does not work with --optimizer_type {options.optimizer.optimizer_type}: "
            "schedule-free optimizers save, draw and validate an average of their own; leave one of them out"
        )
    return WeightAverage(network.trainable_parameters(), wanted.ema_decay, wanted.ema_update_after_step)


def gradient_scaler(options: TrainOptions, device: torch.device) -> torch.amp.GradScaler | None:
    """fp16 gradients need scaling."""
    if options.precision.mixed_precision != "fp16":
        return None
    scaler = torch.amp.GradScaler(device.type)
    if options.precision.full_fp16:
        allow_fp16_gradients(scaler)
    return scaler


def allow_fp16_gradients(scaler: torch.amp.GradScaler) -> None:
    """--full_fp16 keeps the adapter itself in fp16, which GradScaler refuses by default."""
    patched: Any = scaler
    unscale = patched._unscale_grads_
    patched._unscale_grads_ = lambda optimizer, inv_scale, found_inf, _: unscale(optimizer, inv_scale, found_inf, True)


def group_names(names: list[str] | None, num_groups: int, options: TrainOptions) -> list[str]:
    """Names of the optimizer's groups for the charts; where the network module gives none they follow the order."""
    if names is not None:
        return names
    trains_denoiser = not options.network.network_train_text_encoder_only
    if num_groups == 1:
        return ["unet" if trains_denoiser else "textencoder"]
    if num_groups == 2 and trains_text_encoders(options) and trains_denoiser:
        return ["textencoder", "unet"]
    return [f"group{i}" for i in range(num_groups)]
