"""The loss of held-out images at fixed noise levels with fixed noise, and the difference of two such losses.

Letters: N images, L noise levels, B images of one batch, C channels, H height, W width.
"""

import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from math import nan, sqrt

import torch
from torch import Generator, Tensor

from library.base.randomness import generator_for, stream_seed
from library.diffusion.timesteps import NUM_TIMESTEPS
from library.options.training.noise import NoiseOptions
from library.protocols import Objective
from library.training.step.context import StepContext
from library.training.step.joining import join_noised
from library.training.step.latents import build_image_features, load_latents
from library.training.step.losses import compute_losses
from library.training.step.pairs import losses_of_pairs, prefers, split_pairs, split_passes
from library.training.step.text_features import build_conditioning
from library.types import Batch, Noised

NUM_LEVELS = 4  # as in sd-scripts

Name = tuple[str | int, ...]
"""The identity of an image."""


def noise_levels(options: NoiseOptions) -> tuple[int, ...]:
    """Return noise levels that divide the range of timesteps into equal parts: 200, 400, 600, 800.

    Narrow ranges have fewer.
    """
    low = options.min_timestep or 0
    high = NUM_TIMESTEPS if options.max_timestep is None else options.max_timestep
    levels = (low + (high - low) * i // (NUM_LEVELS + 1) for i in range(1, NUM_LEVELS + 1))
    return tuple(dict.fromkeys(min(level, NUM_TIMESTEPS - 1) for level in levels))


def batch_losses(context: StepContext, batch: Batch, names: Sequence[Name], levels: Sequence[int], seed: int) -> Tensor:
    """Return each image's loss at each level without subset weights; float64, shape BL, on the CPU.

    The result depends on the weights, the image and the seed: an image has its own noise at every level, in any batch.
    Call inside `evaluating`.
    """
    batch_seed = stream_seed(seed, "validation", *(word for name in names for word in name))
    torch.manual_seed(batch_seed)  # third-party network modules may draw even in evaluation mode
    random.seed(batch_seed)
    passes = [losses_at_levels(context, pass_batch, names, levels, seed) for pass_batch in split_passes(context, batch)]
    return torch.stack(passes).mean(0)


def losses_at_levels(
    context: StepContext, batch: Batch, names: Sequence[Name], levels: Sequence[int], seed: int
) -> Tensor:
    """Return `batch_losses` of one pass; both images of a pair have the same noise."""
    is_preference = prefers(context, batch)
    clean_sides = []
    for side in split_pairs(batch) if is_preference else [batch]:
        latents_BCHW = load_latents(context, side, lambda i: generator_for(seed, "validation vae", *names[i]))
        clean_sides.append(context.arch.codec.normalize(latents_BCHW))
    extra = {} if is_preference else build_image_features(context, batch, seed, lambda i: ("validation", *names[i]))
    condition = partial(build_conditioning, context, extra=extra)
    columns = []
    for level in levels:
        objective = context.arch.objective.at_timestep(level)
        noised = []
        for clean_BCHW in clean_sides:
            generators = [generator_for(seed, "validation noise", *name, level) for name in names]
            noised.append(corrupt_each(objective, clean_BCHW, generators))
        if is_preference:
            columns.append(losses_of_pairs(context, objective, batch, noised, partial(condition, batch)))
        else:
            columns.append(compute_losses(context, objective, batch, noised[0], condition))
    return torch.stack(columns, 1).cpu().double()


def corrupt_each(objective: Objective, clean_BCHW: Tensor, generators: Sequence[Generator]) -> Noised:
    """Apply `Objective.corrupt` to each image separately, with its own generator."""
    parts = [objective.corrupt(clean_BCHW[i : i + 1], generator) for i, generator in enumerate(generators)]
    return join_noised(parts)


@dataclass(frozen=True)
class Difference:
    """The mean difference of two evaluations of the same images, noise and levels."""

    mean: float
    standard_error: float  # NaN for a single image

    @property
    def is_clear(self) -> bool:
        """Return True if it exceeds twice its standard error."""
        return abs(self.mean) > 2 * self.standard_error


def estimate_paired_difference(now_NL: Tensor, before_NL: Tensor, images: Sequence[Hashable]) -> Difference:
    """Return the mean of `now_NL` - `before_NL` with its standard error.

    Levels of one image, and rows of the same image (identified by `images`), are not independent, so each image counts
    once: with deviations d from the mean, the variance is G / (G - 1) * sum over images of (sum of their rows' d)^2 /
    N^2 for G images. Source: the cluster-robust variance of a mean, Cameron and Miller 2015, "A Practitioner's Guide to
    Cluster-Robust Inference".
    """
    differences_N = (now_NL.double() - before_NL.double()).mean(1)
    mean = differences_N.mean()
    index_by_image = {image: i for i, image in enumerate(dict.fromkeys(images))}
    if len(index_by_image) < 2:
        return Difference(mean.item(), nan)
    index_N = torch.tensor([index_by_image[image] for image in images])
    sums_G = torch.zeros(len(index_by_image), dtype=torch.float64).index_add_(0, index_N, differences_N - mean)
    G, N = len(index_by_image), len(images)
    return Difference(mean.item(), sqrt(G / (G - 1) * sums_G.square().sum().item()) / N)
