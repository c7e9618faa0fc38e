"""A dry run: everything up to the first step, tried on the largest batch; nothing is written."""

import logging
import math
import time
from functools import partial
from typing import Any

import torch

from library.base.errors import about
from library.base.formatting import format_bytes
from library.memory.devices import bytes_of
from library.options.training.averaging import FILES
from library.training.evaluation.without_side_effects import show_weights
from library.training.failures.out_of_memory import Sizes, explain_out_of_memory, measure_sizes, memory_figures
from library.training.loop.loop import MemoryHints, backward
from library.training.loop.steps import PreparedRun
from library.training.loop.update import round_weights
from library.training.run.selftest import test_itself
from library.training.run_parts import Run
from library.training.saving.checkpoints import Writer
from library.training.step.losses import add_noise_to, describe_shape

logger = logging.getLogger(__name__)

DRY_RUN_VALUES: dict[str, Any] = {  # caches stay in memory, no trackers, no uploads, no resume
    **dict.fromkeys(("cache_latents_to_disk", "cache_text_encoder_outputs_to_disk", "autoresume"), False),
    **dict.fromkeys(("logging_dir", "log_with", "huggingface_repo_id", "resume"), None),
}


def try_out(prepared: PreparedRun, largest: int | None, hints: MemoryHints) -> bool:
    """Run what --selftest and --dry_run request; `largest` is the index of the largest batch, None without --dry_run.
    Return True if nothing else is to be done."""
    run = prepared.run
    if run.options.diagnostics.selftest:
        with explain_out_of_memory("testing itself (--selftest)", run.options, run.context.device, ""):
            test_itself(run)
    if largest is not None:
        try_largest_batch(run, prepared.writer, largest, hints)
    return largest is not None


def try_largest_batch(run: Run, writer: Writer, batch_index: int, hints: MemoryHints) -> None:
    """Train one step on a batch of the first epoch, then run a second pass, and log the memory needed.

    The second pass runs with the optimizer state allocated, so it shows the peak of
    training. Raises UserError if the loss is not finite, OutOfMemoryError if memory runs out.
    """
    (batch,) = run.batches.iterate_epoch(1, [batch_index], lambda index: 0, 0, False)
    shape, sizes = describe_shape(batch), measure_sizes(run)
    logger.info("dry run: memory while loading and caching: %s", memory_figures(run.context.device))
    doing, predicted = "training the largest batch (--dry_run)", partial(hints, run, batch)
    with explain_out_of_memory(doing, run.options, run.context.device, shape, lambda: sizes, predicted):
        loss = backward(run, batch, batch_index, 1, 0).item()
        with round_weights(run, 0):
            run.optimization.optimizer.step()
        run.optimization.optimizer.zero_grad(set_to_none=True)
        with show_weights(run, FILES):  # fails here if the weights to save cannot be swapped in
            pass
        if run.context.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(run.context.device)
        started = time.perf_counter()
        backward(run, batch, batch_index, 1, 0).item()
        seconds = time.perf_counter() - started
    if not math.isfinite(loss):
        add_noise_to(run.context, batch, batch_index)  # raises the error that names the VAE
        raise about("--dry_run")(f": the loss of the largest batch is {loss}; images: {', '.join(batch.keys)}")
    report(run, writer, sizes, shape, loss, seconds)


def report(run: Run, writer: Writer, sizes: Sizes, shape: str, loss: float, seconds: float) -> None:
    plan, options = run.plan, run.options
    logger.info("dry run: the largest batch has %s; its loss is %.4f", shape, loss)
    logger.info(
        "dry run: %d parameters are trained (%s); frozen are denoiser %s, text encoders %s, VAE %s",
        sizes.num_trained,
        format_bytes(bytes_of(run.context.network.module)),
        format_bytes(sizes.denoiser),
        format_bytes(sizes.text_encoders),
        format_bytes(sizes.vae) if sizes.vae else "none: latents are cached",
    )
    logger.info("dry run: memory of a step: %s", memory_figures(run.context.device))
    logger.info(
        "dry run: %d steps in %d epochs of %d batches; forward and backward of the largest batch take %.2f s, so the "
        "run takes up to %.1f min besides saving",
        plan.max_train_steps,
        plan.num_epochs,
        plan.num_batches,
        seconds,
        seconds * plan.max_train_steps * options.run.gradient_accumulation_steps / 60,
    )
    logger.info("dry run: the adapter would be saved as %s; nothing was written", writer.names.of_end())
