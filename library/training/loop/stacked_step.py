"""One batch for several adapters: the frozen model runs once on the stacked rows of all adapters.

Letters: M adapters, B samples of the batch, C channels, H height, W width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from library.memory.devices import send
from library.randomness import stream_seed
from library.training.run_parts import Run
from library.training.step.context import StepContext
from library.training.step.joining import join_conditioning, join_noised, repeat_batch, split_conditioning
from library.training.step.latents import build_image_features
from library.training.step.losses import add_noise_to, compute_losses, encode_varied, start_batch, vary
from library.training.step.text_features import build_conditioning
from library.types import Batch, Conditioning

T = TypeVar("T")


@dataclass(frozen=True)
class StackedNetworks:
    """Several networks, each acting on its own part of the rows."""

    contexts: Sequence[StepContext]

    def set_noise_levels(self, levels_B: Tensor | None) -> None:
        count = len(self.contexts)
        parts = [None] * count if levels_B is None else levels_B.chunk(count)
        for context, part in zip(self.contexts, parts, strict=True):
            context.network.set_noise_levels(part)

    def set_multiplier(self, multiplier: float) -> None:
        for context in self.contexts:
            context.network.set_multiplier(multiplier)


def is_stacked(runs: Sequence[Run], batch: Batch) -> bool:
    """Return True if the adapters share a pass.

    They do not for prompts without images, where each adapter draws its own latents, or for pairs, which change an
    adapter's strength within a step.
    """
    return len(runs) > 1 and batch.concept is None and not runs[0].context.pairs.are_trained


def backward_stacked(
    runs: Sequence[Run], batch: Batch, batch_number: int, window_size: float, step: int
) -> list[Tensor]:
    """Accumulate the gradients of one batch for every adapter. Return each adapter's loss.

    Noise, noise levels and dropout are functions of each adapter's seed, as in a run of that adapter alone.
    """
    first, contexts, times = runs[0], [run.context for run in runs], runs[0].times
    assert first.multiplexer is not None
    seeds = {run.adapter_index: stream_seed(run.context.seed, "step", batch_number) for run in runs}
    repeated_batch = repeat_batch(batch, len(runs))
    with first.multiplexer.together(seeds, first.context.device), times.counted(repeated_batch) as begin_backward:
        with times.stage("forward"):
            for context in contexts:
                start_batch(context, batch_number, step)
            losses_M = compute_stacked_losses(contexts, batch, repeated_batch, batch_number)
            scalers = [run.optimization.scaler for run in runs]
            parts = [loss / window_size for loss in losses_M]
            scaled = [p if s is None else s.scale(p) for p, s in zip(parts, scalers, strict=True)]
        begin_backward()
        with times.stage("backward"):
            # One pass for the sum of the losses: no adapter has a gradient from another one's loss.
            torch.autograd.backward(scaled)
    return [loss.detach().float() for loss in losses_M]


def compute_stacked_losses(
    contexts: Sequence[StepContext], batch: Batch, repeated_batch: Batch, batch_number: int
) -> Sequence[Tensor]:
    """Return each adapter's loss, scalars with gradient; `repeated_batch` repeats the batch once per adapter."""
    first, count = contexts[0], len(contexts)
    noised = make_for_each_seed(contexts, lambda context: add_noise_to(context, batch, batch_number, is_checked=False))
    extra = make_for_each_seed(
        contexts,
        lambda context: build_image_features(
            context, batch, context.seed, lambda place: ("batch", batch_number, place)
        ),
    )
    joined = join_noised(noised)
    condition = partial(encode_stacked, contexts, batch, repeated_batch, batch_number, extra)
    losses_MB = compute_losses(
        first, first.arch.objective, repeated_batch, joined, condition, StackedNetworks(contexts)
    )
    weights_B = send(batch.loss_weights_B, losses_MB.device)
    return [(losses_B * weights_B).mean() for losses_B in losses_MB.chunk(count)]


def make_for_each_seed(contexts: Sequence[StepContext], make: Callable[[StepContext], T]) -> list[T]:
    """Call `make` once for each distinct seed, and return a result for each context."""
    made: dict[int, T] = {}
    for context in contexts:
        # Adapters with equal seeds get equal noise, so the VAE encodes the images once for them.
        if context.seed not in made:
            made[context.seed] = make(context)
    return [made[context.seed] for context in contexts]


def encode_stacked(
    contexts: Sequence[StepContext],
    batch: Batch,
    repeated_batch: Batch,
    batch_number: int,
    extra: Sequence[Conditioning],
) -> Conditioning:
    """Return the text conditioning of all rows. Text encoders that train run once on the captions of all adapters."""
    if contexts[0].trains_text_encoder:
        conditioning = build_conditioning(contexts[0], repeated_batch, join_conditioning(extra))
        parts = [
            vary(c, part, batch_number)
            for c, part in zip(contexts, split_conditioning(conditioning, len(contexts)), strict=True)
        ]
    else:
        parts = [encode_varied(c, batch, batch_number, features) for c, features in zip(contexts, extra, strict=True)]
    return join_conditioning(parts)
