"""Random masks for inpainting."""

import numpy as np
import pytest
import torch

from library.diffusion.inpainting import blank, draw_cloud, draw_mask, draw_polygon, draw_shapes, mask_channels


@pytest.mark.parametrize("draw", [draw_cloud, draw_polygon, draw_shapes])
@pytest.mark.parametrize(("width", "height"), [(64, 64), (512, 320), (192, 1024)])
def test_each_kind_of_mask_covers_a_part_that_varies_between_draws(draw, width, height):
    masks = [draw(width, height, np.random.default_rng(seed)) for seed in range(20, 60)]
    assert all(mask.shape == (height, width) and set(np.unique(mask)) <= {0, 1} for mask in masks)
    shares = np.array([mask.mean() for mask in masks])
    assert shares.max() < 0.95 and shares.mean() > 0.05 and shares.std() > 0.02
    again = draw(width, height, np.random.default_rng(20))
    assert np.array_equal(masks[0], again) and not np.array_equal(masks[0], masks[1])


def test_masks_vary_and_are_never_empty_or_full():
    rng = np.random.default_rng(81)
    masks = [draw_mask(64, 72, rng) for _ in range(200)]
    assert all(0 < mask.mean() < 1 for mask in masks)
    edges = [np.abs(np.diff(mask, axis=1)).sum() for mask in masks]
    assert len(set(edges)) > 100


def test_the_model_gets_the_mask_at_latent_size_and_the_image_blanked_under_it():
    generator = torch.Generator().manual_seed(82)
    masks = torch.zeros(2, 1, 32, 48)
    masks[0, :, 8:24, 16:40] = 1
    masks[1, :, :, 24:] = 1
    pixels = torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1
    blanked = blank(pixels, masks)
    assert (blanked[masks.expand_as(blanked) == 1] == 0).all()
    assert torch.equal(blanked[masks.expand_as(blanked) == 0], pixels[masks.expand_as(blanked) == 0])
    latents = torch.randn(2, 4, 4, 6, generator=generator)
    channels = mask_channels(masks, latents)
    assert channels.shape == (2, 5, 4, 6) and torch.equal(channels[:, 1:], latents)
    assert channels[0, 0].tolist() == [[0] * 6, *[[0, 0, 1, 1, 1, 0]] * 2, [0] * 6]
    assert channels[1, 0].tolist() == [[0, 0, 0, 1, 1, 1]] * 4
