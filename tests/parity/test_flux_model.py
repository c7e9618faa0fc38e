"""FLUX.1's denoiser against diffusers' FluxTransformer2DModel with the same weights."""

import torch

from library.architectures.flux.model import PATCH
from library.architectures.flux.reference import diffusers_model
from library.models.patches import patchify
from tests.tiny.flux import NUM_TEXT, inputs, oracle_output, tiny_flux
from tests.tolerances import FLOAT32_DEEP


def test_masked_tokens_have_no_effect() -> None:
    """All text shares one position, so omitting padding gives the same result; diffusers gets the short text."""
    ours = tiny_flux(2)
    theirs = diffusers_model(ours)
    latents, sigmas, text, pooled, guidance = (value.detach() for value in inputs(8, 6))
    mask = torch.ones(2, NUM_TEXT)
    mask[:, 4:] = 0
    masked = ours(latents, sigmas, text, pooled, guidance, mask)
    short = oracle_output(theirs, latents, sigmas, text[:, :4], pooled, guidance)
    torch.testing.assert_close(patchify(masked, PATCH), short, **FLOAT32_DEEP)
    assert not torch.allclose(masked, ours(latents, sigmas, text, pooled, guidance), rtol=1e-2)
    uneven = mask.clone()
    uneven[1, 4:] = 1  # each sample has its own mask
    both = ours(latents, sigmas, text, pooled, guidance, uneven)
    torch.testing.assert_close(both[0], masked[0], **FLOAT32_DEEP)
    torch.testing.assert_close(both[1], ours(latents, sigmas, text, pooled, guidance)[1], **FLOAT32_DEEP)
