"""Looking at the model in the middle of training without a trace: previews and validation."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from library.training.run_parts import Run
from library.training.step.modes import eval_mode


@contextmanager
def evaluating(run: Run, use: str) -> Iterator[None]:
    """The weights for `use` (`shown_weights`), dropout off, no gradients; afterwards all is as it was, bit for bit.

    Adapters use all they have: DyLoRA its full rank, T-LoRA too unless it is told of noise levels, as in validation,
    and all of them their full strength, which a batch of a concept sets anew. The random streams of torch and Python
    are put back.
    """
    run.context.network.set_noise_levels(None)
    if run.options.concepts is not None:
        run.context.network.set_multiplier(1.0)
    modules = [run.context.models.denoiser, *run.context.models.text_encoders, run.context.network.module]
    with (
        run.context.alone(),
        torch.no_grad(),
        random_streams_kept(run.context.device),
        eval_mode(modules),
        shown_weights(run, use),
    ):
        yield


@contextmanager
def shown_weights(run: Run, use: str) -> Iterator[None]:
    """Put the weights for `use`, one of those in `library.options.training.averaging`, in place for the block.

    They are the average of a schedule-free optimizer, or the moving average where it is meant for this use.
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
    """The generators of torch, on the CPU and on a card, and Python's are afterwards where they were."""
    state = random.getstate()
    cards = [device.index or 0] if device.type in ("cuda", "xpu") else []
    try:
        with torch.random.fork_rng(devices=cards, device_type=device.type if cards else "cuda"):
            yield
    finally:
        random.setstate(state)
