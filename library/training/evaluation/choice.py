"""The choice among saved files by their losses on the same images, compared image by image.

Suggested is the earliest file within one standard error of the lowest loss, where the error is that of the difference
over images (Breiman et al. 1984, "Classification and Regression Trees", has the rule for sizes of trees). A suggestion
weighs two losses against each other, too little training and too much; a test guards against one of them only. The
earliest file that is not significantly worse is under-trained: tests/unit/training/test_choice.py has the figures.

Whether a file is significantly worse than the best is such a test. The lowest of many losses is lower than the others
by chance alone, so it allows for all the comparisons at once: of F files each difference to the lowest is tested
two-sided at 5 % / (F - 1), by Student's t over images (Bonferroni's correction; Dunn 1961, "Multiple Comparisons Among
Means"). If differences are distributed symmetrically, the file that is truly best is called worse with a probability of
at most 2.5 %, and where several are equally good, one of them is named the winner with at most 5 % (Hsu 1984,
"Constrained Simultaneous Confidence Intervals for Multiple Comparisons with the Best", has the idea). Two files that
differ by noise alone have symmetric differences. Strongly skewed ones reach 15 %; a sign-flip permutation test assumes
the same symmetry and does no better (15 % on 12 images, log-normal).

Letters: F files, N rows that were measured, G images, copies of one being one.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt

import torch
from torch import Tensor

CONFIDENCE = 0.95
MIN_IMAGES = 8  # with fewer, one image decides which file has the lowest loss, and a standard error is a rough guess


@dataclass(frozen=True)
class Estimate:
    """A mean over images, its interval and its standard error, which are NaN for a single image."""

    mean: float
    low: float
    high: float
    error: float


@dataclass(frozen=True)
class Compared:
    """The measurements of one file."""

    loss: Estimate  # the interval is its own, at 95 %
    to_best: Estimate  # its loss less the lowest one; the intervals of all files hold together
    is_worse: bool  # than the best, by more than chance
    is_copy: bool  # of the best, digit for digit


@dataclass(frozen=True)
class Choice:
    """The suggested file, and how the others compare with the best."""

    files: tuple[Compared, ...]  # in the order given
    best: int
    suggested: int  # meaningful with at least MIN_IMAGES
    has_winner: bool  # every other file is clearly worse than the best
    num_images: int


def choose(losses_FG: Tensor, num_baselines: int = 0) -> Choice | None:
    """Compare files that are given in the order of their steps; None where no loss is a number.

    The first `num_baselines` rows, such as the base model alone, are compared and never suggested. A file whose loss is
    not a number is clearly worse.
    """
    num_files, num_images = losses_FG.shape
    is_finite = losses_FG.isfinite().all(1).tolist()
    means = losses_FG.mean(1).tolist()
    finite = [i for i in range(num_files) if is_finite[i]]
    if not any(i >= num_baselines for i in finite):
        return None
    best = min((i for i in finite if i >= num_baselines), key=means.__getitem__)
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
    return Choice(tuple(files), best, suggested, has_winner, num_images)


def is_clearly_worse(losses_G: Tensor, best_G: Tensor, num_compared: int) -> bool:
    """Return True if one of `num_compared` losses that are compared with the best lies above it by more than chance."""
    return estimate(losses_G - best_G, (1 - CONFIDENCE) / num_compared).low > 0


def by_image(losses_N: Tensor, images: Sequence[Hashable]) -> Tensor:
    """Return the mean of the rows that are the same image, shape G, float64; `images` says which is which."""
    numbers = {image: i for i, image in enumerate(dict.fromkeys(images))}
    index_N = torch.tensor([numbers[image] for image in images])
    sums_G = torch.zeros(len(numbers), dtype=torch.float64).index_add_(0, index_N, losses_N.double())
    return sums_G / torch.bincount(index_N, minlength=len(numbers))


def estimate(values_G: Tensor, level: float = 1 - CONFIDENCE) -> Estimate:
    """Estimate the mean of independent values, with an interval that misses it with probability `level`."""
    count = len(values_G)
    return within(values_G.mean().item(), values_G.std().item() / sqrt(count) if count > 1 else nan, count - 1, level)


def estimate_of_difference(values_G: Tensor, others_G: Tensor, level: float = 1 - CONFIDENCE) -> Estimate:
    """Return the mean of `values_G` less that of `others_G`, which are independent of each other (Welch 1947)."""
    counts = len(values_G), len(others_G)
    mean = (values_G.mean() - others_G.mean()).item()
    variances = (values.var().item() / len(values) if len(values) > 1 else nan for values in (values_G, others_G))
    return within(mean, sqrt(sum(variances)), min(counts) - 1, level)


def within(mean: float, error: float, degrees: int, level: float) -> Estimate:
    """Return the interval by Student's t around a mean with a standard error; NaN where that is."""
    from scipy.special import stdtrit

    if isnan(error):
        return Estimate(mean, nan, nan, nan)
    reach = float(stdtrit(degrees, 1 - level / 2)) * error
    return Estimate(mean, mean - reach, mean + reach, error)
