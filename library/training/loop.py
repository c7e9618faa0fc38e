"""The training loop."""

import logging
import math
import random
from functools import partial

import torch

from library.randomness import stream_seed
from library.training.interruption import Interruption
from library.training.logs import Charts
from library.training.optimizers import effective_rates
from library.training.report import (
    LimitedNorms,
    LossAverage,
    announce,
    announce_epoch,
    bar_values,
    progress_bar,
    rate_values,
)
from library.training.run import Run
from library.training.saving import Writer
from library.training.step import loss_of
from library.types import Batch

logger = logging.getLogger(__name__)


def train(run: Run, writer: Writer, charts: Charts, interruption: Interruption) -> None:
    """Train to the last step, or to the step in which the user interrupts; either way the adapter is saved."""
    plan, text_encoder_view, denoiser_view = run.plan, *run.models.network_view
    dataset = run.options.dataset
    average = LossAverage()
    norm_limit = wanted_norm_limit(run)
    step = 0
    with progress_bar(plan.max_train_steps, step) as bar:
        for epoch in range(1, plan.num_epochs + 1):
            announce_epoch(epoch, plan.num_epochs)
            run.network.start_epoch(text_encoder_view, denoiser_view)
            batches = run.training_set.batches(
                epoch,
                0,
                partial(plan.step_of, epoch),
                dataset.max_data_loader_n_workers,
                dataset.persistent_data_loader_workers,
            )
            for index, batch in enumerate(batches):
                loss = backward(run, batch, plan.batch_number(epoch, index), plan.window_size(index), step)
                rates = [float(rate) for rate in run.schedule.get_last_lr()]
                if plan.ends_window(index):
                    optimizer_step(run)
                    step += 1
                    bar.update(1)
                norms = None if norm_limit is None else LimitedNorms(*run.network.limit_norms(norm_limit, run.device))
                average.add(index, watched(loss, step, batch))
                bar.set_postfix(bar_values(average.mean, norms))
                if charts.are_on:
                    charts.log_step(step_values(run, loss, average.mean, rates, norms), step, epoch)
                if plan.ends_window(index):
                    writer.save_after_step(step, epoch)
                    if step >= plan.max_train_steps or interruption.is_requested:
                        break
            if charts.are_on:
                charts.log_epoch({"loss/epoch_average": average.mean}, step, epoch)
            if interruption.is_requested:
                break
            writer.save_after_epoch(step, epoch)
    finish(writer, step, epoch, is_complete=step >= plan.max_train_steps)


def backward(run: Run, batch: Batch, batch_number: int, window_size: int, step: int) -> float:
    """Add the gradient of one batch; gives its loss. Dropout inside the models draws from a stream of the batch."""
    seed = stream_seed(run.seed, "step", batch_number)
    torch.manual_seed(seed)
    random.seed(seed)
    run.network.start_step(*run.models.network_view)
    run.network.start_optimizer_step(run.seed, step)
    loss = loss_of(run, batch, batch_number)
    scaled = loss / window_size
    torch.autograd.backward(scaled if run.scaler is None else run.scaler.scale(scaled))
    return loss.item()


def optimizer_step(run: Run) -> None:
    """Clip, move the weights, move the learning rate, forget the gradients."""
    optimizer, max_norm = run.torch_optimizer, run.options.optimizer.max_grad_norm
    if run.scaler is not None:
        run.scaler.unscale_(optimizer)
    if max_norm != 0:
        torch.nn.utils.clip_grad_norm_(run.network.trainable_parameters(), max_norm)
    if run.scaler is not None:
        run.scaler.step(optimizer)
        run.scaler.update()
    else:
        optimizer.step()
    run.schedule.step()
    optimizer.zero_grad(set_to_none=True)


def wanted_norm_limit(run: Run) -> float | None:
    """--scale_weight_norms; None where it is not wanted, or where this network cannot do it, which is warned of.

    Raises ValueError for a negative limit.
    """
    limit = run.options.network.scale_weight_norms
    if not limit:
        return None
    if limit < 0:
        raise ValueError(f"--scale_weight_norms is {limit:g}; a norm is at least 0, and 0 sets no limit")
    if not run.network.can_limit_norms:
        logger.warning(
            "--scale_weight_norms has no effect: the network of %s has no apply_max_norm_regularization()",
            run.options.network.network_module,
        )
        return None
    return limit


def watched(loss: float, step: int, batch: Batch) -> float:
    """The loss unchanged; one that is not a number is reported with the pictures that gave it."""
    if not math.isfinite(loss):
        logger.error("the loss of step %d is %s; pictures: %s", step, loss, ", ".join(batch.keys))
    return loss


def step_values(
    run: Run, loss: float, average: float, rates: list[float], norms: LimitedNorms | None
) -> dict[str, float]:
    """What the charts show of a batch."""
    effective = effective_rates(run.torch_optimizer, run.optimizer.name)
    is_first_text_encoder = not run.options.network.network_train_unet_only
    values = rate_values(rates, run.group_names, effective, is_first_text_encoder)
    if effective is not None and "prodigyplus" in run.optimizer.name.lower():
        values["lr/d*lr"] = effective[0]
    limited = {} if norms is None else norms.chart_values()
    return {**limited, "loss/current": loss, "loss/average": average, **values}


def finish(writer: Writer, step: int, epoch: int, is_complete: bool) -> None:
    """Save the end of the run: under the final name, or under the step's name where it was interrupted."""
    if is_complete:
        writer.write(writer.names.of_end(), step, epoch)
        announce("model saved.")
        return
    path = writer.names.of_step(step)
    writer.write(path, step, epoch)
    announce(f"training was interrupted after step {step}; to go on from these weights: --network_weights {path}")
