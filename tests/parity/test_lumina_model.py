"""Lumina Image 2.0's denoiser against diffusers' Lumina2Transformer2DModel with the same weights."""

import torch

from tests.tiny.lumina import inputs, tiny_lumina
from tests.tolerances import FLOAT32_DEEP


def test_padding_does_not_affect_outputs() -> None:
    model = tiny_lumina(2)
    latents, times, text, mask = (value.detach() for value in inputs(8, 6, (5, 2)))
    expected = model(latents, times, text, mask)
    other = torch.where(mask.bool()[..., None], text, 100.0)
    torch.testing.assert_close(model(latents, times, other, mask), expected, **FLOAT32_DEEP)
    assert not torch.allclose(model(latents, times, text, torch.ones_like(mask)), expected, rtol=1e-2)
