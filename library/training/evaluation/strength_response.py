"""How images respond to an adapter's strength: one prompt and seed drawn at several strengths.

The change of an image is its projection, in pixel space, onto the line from the image of the lowest strength (0) to
that of the highest (1): (image - first) . (last - first) / |last - first|^2. Its rank correlation with the strength
(Spearman 1904) is 1 if every higher strength goes further, however unevenly.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
from PIL import Image

FEWEST = 3  # strengths; two images always correlate perfectly


@dataclass(frozen=True)
class StrengthResponse:
    """The changes of one prompt's images, in order of strength."""

    strengths: Sequence[float]
    changes: Sequence[float]

    @property
    def correlation(self) -> float:
        """The rank correlation of strength and change; NaN if all images are equal."""
        return rank_correlation(self.strengths, self.changes)


def measure_response(strengths: Sequence[float], images: Sequence[Image.Image]) -> StrengthResponse:
    """Return the change of each image. Needs at least `FEWEST` different strengths."""
    assert len(set(strengths)) >= FEWEST
    ordered = sorted(zip(strengths, images, strict=True), key=lambda pair: pair[0])
    pixels = [np.asarray(image.convert("RGB"), dtype=np.float64).ravel() / 255 for _, image in ordered]
    direction = pixels[-1] - pixels[0]
    length = float(direction @ direction)
    changes = [float((values - pixels[0]) @ direction) / length if length else nan for values in pixels]
    return StrengthResponse([strength for strength, _ in ordered], changes)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation with mean ranks for ties; NaN if one side is constant."""
    from scipy.stats import spearmanr

    is_constant = any(len(set(values)) < 2 for values in (first, second))  # which scipy warns of
    return nan if is_constant else float(spearmanr(first, second).statistic)
