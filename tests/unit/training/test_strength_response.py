"""The rank correlation of an adapter's strength with the change of its images."""

import numpy as np
import pytest
from PIL import Image

from library.training.evaluation.strength_response import measure_response, rank_correlation


def test_without_ties_the_correlation_is_spearmans_formula() -> None:
    rng = np.random.default_rng(7)
    x, y = rng.permutation(9), rng.permutation(9)
    expected = 1 - 6 * float(((x - y) ** 2).sum()) / (9 * (81 - 1))
    assert rank_correlation(x.tolist(), y.tolist()) == pytest.approx(expected)


def test_ties_share_their_mean_rank() -> None:
    expected = np.corrcoef([3.5, 1.0, 3.5, 2.0], [1, 2, 3, 4])[0, 1]
    assert rank_correlation([3.0, 1.0, 3.0, 2.0], [5.0, 6.0, 7.0, 8.0]) == pytest.approx(expected)
    assert np.isnan(rank_correlation([1.0, 2.0], [5.0, 5.0]))


def image(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(values).astype(np.uint8))


def test_the_change_is_the_position_on_the_line_from_the_first_to_the_last_image() -> None:
    """Changes orthogonal to that line do not count; strengths may come in any order."""
    first, last = np.zeros((2, 2, 3)), np.zeros((2, 2, 3))
    last[0, 0], across = 200, np.zeros((2, 2, 3))
    across[1, 1] = 90
    shares = {-2.0: 0.0, -1.0: 0.6, 0.0: 0.5, 2.0: 1.0}
    order = [0.0, 2.0, -2.0, -1.0]
    response = measure_response(order, [image(first + shares[s] * (last - first) + across * (s == -1)) for s in order])
    assert list(response.strengths) == [-2.0, -1.0, 0.0, 2.0]
    assert response.changes == pytest.approx([0.0, 0.6, 0.5, 1.0])
    assert response.correlation == pytest.approx(0.8)


def test_equal_images_have_no_correlation() -> None:
    assert np.isnan(measure_response([-1.0, 0.0, 1.0], [image(np.full((2, 2, 3), 7.0))] * 3).correlation)
