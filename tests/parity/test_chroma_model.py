"""Chroma's denoiser against diffusers' ChromaTransformer2DModel with the same weights."""

import torch

from library.architectures.flux.model import PATCH
from library.architectures.flux.predict import with_first_padding
from library.models.patches import patchify
from tests.tiny.chroma import NUM_TEXT, inputs, tiny_chroma, velocity
from tests.tolerances import FLOAT32_DEEP


def test_one_padding_token_after_the_caption_is_attended_to() -> None:
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]])
    expected = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert with_first_padding(mask).int().tolist() == expected


def test_masked_tokens_have_no_effect() -> None:
    model = tiny_chroma(22)
    latents, sigmas, text = (value.detach() for value in inputs(8, 6, 1))
    mask = (torch.arange(NUM_TEXT) < 4).expand(2, -1)
    torch.testing.assert_close(
        velocity(model, latents, sigmas, text, mask), velocity(model, latents, sigmas, text[:, :4]), **FLOAT32_DEEP
    )
    assert not torch.allclose(velocity(model, latents, sigmas, text), velocity(model, latents, sigmas, text, mask))


def test_guidance_is_an_input() -> None:
    """diffusers fixes it to 0; the model accepts any value."""
    model = tiny_chroma(23)
    latents, sigmas, text = (value.detach() for value in inputs(6, 6, 2))
    guided = model(latents, sigmas, text, None, torch.full_like(sigmas, 3.5))
    assert not torch.allclose(patchify(guided, PATCH), velocity(model, latents, sigmas, text), rtol=1e-3)


def test_the_approximator_needs_no_gradient_unless_it_is_trained() -> None:
    model = tiny_chroma(26)
    rows = model.modulation(torch.tensor([0.5]), None, torch.zeros(1), torch.float32)
    assert not any(row.requires_grad for row in rows)
    model.distilled_guidance_layer.layers[1].in_layer.weight.requires_grad_()
    rows = model.modulation(torch.tensor([0.5]), None, torch.zeros(1), torch.float32)
    assert all(row.requires_grad for row in rows)
