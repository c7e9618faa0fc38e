"""Evaluation in the middle of training without side effects, for previews and validation."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from library.training.run_parts import Run
from library.training.step.modes import eval_mode


@contextmanager
def evaluating(run: Run, use: str) -> Iterator[None]:
    """Evaluate inside the block: the weights for `use` (`show_weights`), no dropout, no gradients. Afterwards
    everything is restored bit for bit.

    Adapters run completely: DyLoRA at full rank, T-LoRA too unless it gets noise levels, as in validation, and all at
    full strength, which each batch of a concept sets again. The random streams of torch and Python are restored.
    """
    run.context.network.set_noise_levels(None)
    # Other runs never change the strength, and a third-party network may have set one of its own.
    if run.options.concepts is not None:
        run.context.network.set_multiplier(1.0)
    modules = [run.context.models.denoiser, *run.context.models.text_encoders, run.context.network.module]
    with torch.no_grad(), random_streams_kept(run.context.device), eval_mode(modules), show_weights(run, use):
        yield


@contextmanager
def show_weights(run: Run, use: str) -> Iterator[None]:
    """Swap in the weights for `use` (one of those in `library.options.training.averaging`) inside the block.

    These are the average of a schedule-free optimizer, or the moving average if it applies to this use.
    """
    average = run.optimization.average if run.options.averaging.averages(use) else None
    run.optimization.built.eval()
    try:
        with nullcontext() if average is None else average.shown():
            yield
    finally:
        run.optimization.built.train()


@contextmanager
def random_streams_kept(device: torch.device) -> Iterator[None]:
    """Restore the generators of torch (CPU and GPU) and Python after the block."""
    # fork_rng covers torch's generators only.
    state = random.getstate()
    gpus = [device.index or 0] if device.type in ("cuda", "xpu") else []
    try:
        with torch.random.fork_rng(devices=gpus, device_type=device.type if gpus else "cuda"):
            yield
    finally:
        random.setstate(state)
