"""Third stage of the set-up: optimizer, schedule and averaging."""

import logging
from typing import Any

import torch

from library.base.errors import about
from library.options.machine.memory import PrecisionOptions
from library.options.train import TrainOptions
from library.options.training.averaging import AveragingOptions
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
    """Build optimizer, schedule and gradient scaler for the adapter's parameters.

    Call after the adapter has its device and dtype, because an optimizer keeps references to the tensors.
    """
    groups, names = network.parameter_groups(
        options.network.text_encoder_lr, options.network.unet_lr, options.optimizer.learning_rate
    )
    if any(options.network.text_encoder_lr or ()) and not options.network.network_train_unet_only:
        warn_of_idle_rate(network)
    optimizer = build_optimizer(options.optimizer, groups)
    schedule = build_schedule(options.schedule, optimizer, max_train_steps)
    network.prepare_gradients(*models.network_view)
    scaler = gradient_scaler(options.precision, device)
    average = build_average(options.averaging, options.optimizer.optimizer_type, network, optimizer.is_schedule_free)
    if names is None:
        trains_denoiser = not options.network.network_train_text_encoder_only
        names = name_groups(len(groups), trains_denoiser, options.trains_text_encoders)
    return Optimization(optimizer, schedule, scaler, names, average)


def warn_of_idle_rate(network: AdoptedNetwork) -> None:
    """Warn if a learning rate is set for text encoders that have no adapter."""
    names = [name for name, _ in network.module.named_parameters()]
    # Other names do not tell which parameters belong to text encoders.
    is_kohyas = any(name.startswith("lora_unet") for name in names)
    if is_kohyas and not any(name.startswith("lora_te") for name in names):
        logger.warning("--text_encoder_lr has no effect: no text encoder has an adapter")


def build_average(
    options: AveragingOptions, optimizer_type: str, network: AdoptedNetwork, is_schedule_free: bool
) -> WeightAverage | None:
    """Build the moving average of the weights. Raises UserError with an optimizer that averages by itself."""
    if not options.ema_decay:
        return None
    if is_schedule_free:
        raise about("--ema_decay", cause="does not fit")(
            f"{options.ema_decay} does not work with --optimizer_type {optimizer_type}: schedule-free optimizers "
            "save, draw and validate an average of their own",
            "leave one of them out",
        )
    return WeightAverage(network.trainable_parameters(), options.ema_decay, options.ema_update_after_step)


def gradient_scaler(options: PrecisionOptions, device: torch.device) -> torch.amp.GradScaler | None:
    """Return a scaler for fp16 gradients; None for other precisions."""
    if options.mixed_precision != "fp16":
        return None
    scaler = torch.amp.GradScaler(device.type)
    if options.full_fp16:
        allow_fp16_gradients(scaler)
    return scaler


def allow_fp16_gradients(scaler: torch.amp.GradScaler) -> None:
    """Accept gradients of an fp16 adapter, which GradScaler refuses by default."""
    # GradScaler has no public switch for this; sd-scripts replaces the same method.
    patched: Any = scaler
    unscale = patched._unscale_grads_
    patched._unscale_grads_ = lambda optimizer, inv_scale, found_inf, _: unscale(optimizer, inv_scale, found_inf, True)


def name_groups(num_groups: int, trains_denoiser: bool, trains_text_encoders: bool) -> list[str]:
    """Name the optimizer's groups by their order, for the charts, if the network module does not name them."""
    if num_groups == 1:
        return ["unet" if trains_denoiser else "textencoder"]
    if num_groups == 2 and trains_text_encoders and trains_denoiser:
        return ["textencoder", "unet"]
    return [f"group{i}" for i in range(num_groups)]
