"""Position embeddings scaled to the dataset's resolutions, against diffusers' table and in the model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.sd3.positions import nearest_side, scaled_positions, square_side, table_side
from tests.tiny.sd3 import DUAL, tiny_mmdit

embeddings: Any = pytest.importorskip("diffusers.models.embeddings")


@pytest.mark.parametrize("side", [24, 32, 64])
def test_a_square_image_covers_sixteen_units_as_in_diffusers_table(side: int) -> None:
    expected = embeddings.get_2d_sincos_pos_embed(48, side, base_size=16, output_type="pt")
    actual = scaled_positions(side, side, side, None, 48)[0]
    # diffusers uses float32 coordinates.
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0.0, atol=2e-6)


def test_other_shapes_are_cropped_from_a_table_one_and_a_half_times_as_large() -> None:
    table = scaled_positions(36, 36, 24, (0, 0), 16).view(36, 36, 16)
    for h, w, corner in ((20, 28, None), (24, 24, None), (7, 36, (29, 0)), (10, 11, (3, 17))):
        top, left = ((36 - h) // 2, (36 - w) // 2) if corner is None else corner
        cut = table[top : top + h, left : left + w].reshape(1, h * w, 16)
        torch.testing.assert_close(scaled_positions(h, w, 24, corner, 16), cut, rtol=0.0, atol=0.0)


def test_an_image_uses_the_resolution_of_the_nearest_area() -> None:
    assert [square_side((512, 512), 2), square_side((1024, 1024), 2), square_side((640, 384), 2)] == [32, 64, 31]
    assert [nearest_side(*shape, [64, 32]) for shape in ((32, 32), (40, 26), (48, 53), (50, 52), (64, 64))] == [
        32, 32, 53, 64, 64
    ]  # fmt: skip
    assert nearest_side(10, 60, [32]) == 60  # longer than the 48 of the table
    assert table_side(31) == 46


def test_the_model_uses_scaled_positions_instead_of_its_table() -> None:
    model = tiny_mmdit(DUAL, 321)
    original = model.positions(6, 4, None)
    model.scaled_sides = (4, 6)
    actual: Tensor = model.positions(6, 4, None)
    assert actual.shape == original.shape
    assert not torch.equal(actual, original)
    assert torch.equal(actual, scaled_positions(6, 4, 4, None, model.config.width))
    assert model.table_side(6, 4) == 6
