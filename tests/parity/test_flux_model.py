"""FLUX.1's denoiser against diffusers' FluxTransformer2DModel with the same weights."""

import pytest
import torch

from library.architectures.flux.model import PATCH
from library.architectures.flux.reference import diffusers_model
from library.models.patches import patchify
from tests.parity.denoisers import assert_checkpointing_keeps_gradients
from tests.tiny.flux import NUM_TEXT, inputs, oracle_output, tiny_flux
from tests.tolerances import FLOAT32_DEEP

SIZES = [(8, 8), (4, 14), (18, 6)]  # of the latent


@pytest.mark.parametrize("has_guidance", [True, False], ids=["dev", "schnell"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_and_input_gradients_match_diffusers(size: tuple[int, int], has_guidance: bool) -> None:
    ours = tiny_flux(1, has_guidance)
    theirs = diffusers_model(ours)
    results = []
    for run in (
        lambda lat, sig, txt, pool, gui: patchify(ours(lat, sig, txt, pool, gui if has_guidance else None), PATCH),
        lambda lat, sig, txt, pool, gui: oracle_output(theirs, lat, sig, txt, pool, gui if has_guidance else None),
    ):
        values = inputs(*size)
        output = run(*values)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        gradients = torch.autograd.grad((output * weights).sum(), values[0:1] + values[2:4])
        results.append((output, *gradients))
    for ours_value, theirs_value in zip(*results, strict=True):
        assert theirs_value.abs().max() > 0.1
        torch.testing.assert_close(ours_value, theirs_value, **FLOAT32_DEEP)


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


def test_gradient_checkpointing_does_not_change_gradients() -> None:
    assert_checkpointing_keeps_gradients(tiny_flux(3), lambda: inputs(8, 6))


def test_blocks_compile_without_graph_breaks() -> None:
    model = tiny_flux(4)
    expected = model(*inputs(8, 6))
    for blocks in (model.double_blocks, model.single_blocks):
        for block in blocks:
            block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(*inputs(8, 6)), expected, **FLOAT32_DEEP)
