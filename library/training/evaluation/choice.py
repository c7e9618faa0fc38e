"""Chooses among saved files by their losses on the same images, compared image by image.

The suggestion is the earliest file within one standard error of the lowest loss; the error is that of the difference
over images (the rule is from Breiman et al. 1984, "Classification and Regression Trees", for tree sizes). A suggestion
has to balance too little training against too much, and a significance test guards against only one of these: the
earliest file that is not significantly worse is under-trained (figures in tests/unit/training/test_suggestion.py).

Whether a file is significantly worse than the best is such a test. The lowest of many losses is partly low by chance,
so the test allows for all comparisons: of F files each difference to the lowest is tested two-sided at 5 % / (F - 1),
by Student's t over images (Bonferroni's correction; Dunn 1961, "Multiple Comparisons Among Means"). If differences are
distributed symmetrically, the truly best file is called worse with a probability of at most 2.5 %, and among equally
good files one is named the winner with at most 5 % (idea from Hsu 1984, "Constrained Simultaneous Confidence Intervals
for Multiple Comparisons with the Best"). Files that differ by noise alone have symmetric differences. Strongly skewed
ones reach 15 %; a sign-flip permutation test assumes the same symmetry and does no better (15 % on 12 images,
log-normal).

Letters: F files, N measured rows, G images, where copies count as one.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt

import torch
from torch import Tensor

CONFIDENCE = 0.95
MIN_IMAGES = 8  # with fewer, a single image decides which file is lowest, and standard errors are unreliable


@dataclass(frozen=True)
class Estimate:
    """A mean over images with its interval and standard error, both NaN for a single image."""

    mean: float
    low: float
    high: float
    error: float


@dataclass(frozen=True)
class Compared:
    """The measurements of one file."""

    loss: Estimate  # with its own 95 % interval
    to_best: Estimate  # its loss minus the lowest one; these intervals hold simultaneously
    is_worse: bool  # significantly worse than the best
    is_copy: bool  # equal to the best in every digit


@dataclass(frozen=True)
class RankedFiles:
    """The suggested file, and each file's comparison with the best."""

    files: tuple[Compared, ...]  # in the order given
    best: int
    suggested: int  # meaningful with at least MIN_IMAGES
    has_winner: bool  # every other file is significantly worse than the best
    num_images: int


def choose(losses_FG: Tensor, num_baselines: int = 0) -> RankedFiles | None:
    """Compare files in the order of their steps; None if no loss is finite.

    The first `num_baselines` rows, such as the base model alone, are compared but never suggested. A file with a
    non-finite loss is significantly worse.
    """
    num_files, num_images = losses_FG.shape
    is_finite = losses_FG.isfinite().all(1).tolist()
    means = losses_FG.mean(1).tolist()
    finite = [i for i in range(num_files) if is_finite[i]]
    if not any(i >= num_baselines for i in finite):
        return None
    best = min((i for i in finite if i >= num_baselines), key=means.__getitem__)
    # Files saved after the same step are equal; counting them as comparisons would only widen the intervals.
    num_different = len({tuple(losses_FG[i].tolist()) for i in finite})
    level = (1 - CONFIDENCE) / max(1, num_different - 1)
    files = []
    for i, row_G in enumerate(losses_FG):
        to_best = estimate(row_G - losses_FG[best], level)
        is_worse = to_best.low > 0 if is_finite[i] else True
        files.append(Compared(estimate(row_G), to_best, is_worse, is_finite[i] and row_G.equal(losses_FG[best])))
    others = [file for file in files[num_baselines:] if not file.is_copy]
    gaps = [file.to_best for file in files]
    suggested = next(i for i in range(num_baselines, num_files) if i == best or gaps[i].mean <= gaps[i].error)
    has_winner = bool(others) and all(file.is_worse for file in others)
    return RankedFiles(tuple(files), best, suggested, has_winner, num_images)


def is_clearly_worse(losses_G: Tensor, best_G: Tensor, num_compared: int) -> bool:
    """Return True if losses are significantly above the best; `num_compared` files are compared with it."""
    return estimate(losses_G - best_G, (1 - CONFIDENCE) / num_compared).low > 0


def average_by_image(losses_N: Tensor, images: Sequence[Hashable]) -> Tensor:
    """Average the rows of each image, shape G, float64; `images` identifies the image of each row."""
    index_by_image = {image: i for i, image in enumerate(dict.fromkeys(images))}
    index_N = torch.tensor([index_by_image[image] for image in images])
    sums_G = torch.zeros(len(index_by_image), dtype=torch.float64).index_add_(0, index_N, losses_N.double())
    return sums_G / torch.bincount(index_N, minlength=len(index_by_image))


def estimate(values_G: Tensor, level: float = 1 - CONFIDENCE) -> Estimate:
    """Estimate the mean of independent values, with an interval that misses it with probability `level`."""
    count = len(values_G)
    return make_interval(
        values_G.mean().item(), values_G.std().item() / sqrt(count) if count > 1 else nan, count - 1, level
    )


def estimate_of_difference(values_G: Tensor, others_G: Tensor) -> Estimate:
    """Estimate the mean of `values_G` minus that of `others_G`, two independent samples (Welch 1947)."""
    counts = len(values_G), len(others_G)
    mean = (values_G.mean() - others_G.mean()).item()
    variances = (values.var().item() / len(values) if len(values) > 1 else nan for values in (values_G, others_G))
    # At most Welch's degrees of freedom, so the interval is never too narrow.
    return make_interval(mean, sqrt(sum(variances)), min(counts) - 1, 1 - CONFIDENCE)


def make_interval(mean: float, error: float, degrees: int, level: float) -> Estimate:
    """Return Student's t interval around a mean with a standard error; NaN if the error is NaN."""
    # Imported here, because scipy takes half a second to import and only runs with validation need it.
    from scipy.special import stdtrit

    if isnan(error):
        return Estimate(mean, nan, nan, nan)
    half_width = float(stdtrit(degrees, 1 - level / 2)) * error
    return Estimate(mean, mean - half_width, mean + half_width, error)
