"""FLUX.1's denoiser against diffusers' FluxTransformer2DModel with the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.flux.model import PATCH
from library.architectures.flux.reference import diffusers_model
from library.models.patches import patchify
from tests.parity.denoisers import assert_checkpointing_keeps_gradients
from tests.tiny.flux import CONFIG, tiny_flux
from tests.tolerances import FLOAT32_DEEP

SIZES = [(8, 8), (4, 14), (18, 6)]  # of the latent
NUM_TEXT = 7


def inputs(H: int, W: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return latents, noise levels, text, pooled text, guidance."""
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 16, H, W, generator=g).requires_grad_()
    text = torch.randn(2, NUM_TEXT, CONFIG.text_width, generator=g).requires_grad_()
    pooled = torch.randn(2, CONFIG.pooled_width, generator=g).requires_grad_()
    return latents, torch.tensor([0.125, 0.875]), text, pooled, torch.tensor([1.0, 3.5])


def oracle_output(
    theirs: Any, latents: Tensor, sigmas: Tensor, text: Tensor, pooled: Tensor, guidance: Tensor | None
) -> Tensor:
    """Return diffusers' velocity as patches, with the image ids of its pipeline."""
    from diffusers import FluxPipeline

    h, w = latents.shape[-2] // 2, latents.shape[-1] // 2
    B, C, H, W = latents.shape
    packed = FluxPipeline._pack_latents(latents, B, C, H, W)
    return theirs(  # type: ignore[no-any-return]
        packed,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=sigmas,
        guidance=guidance,
        img_ids=FluxPipeline._prepare_latent_image_ids(B, h, w, latents.device, torch.float32),
        txt_ids=torch.zeros(text.shape[1], 3),
    ).sample


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
