"""Chroma's denoiser against diffusers' ChromaTransformer2DModel with the same weights."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from library.architectures.flux.model import PATCH
from library.architectures.flux.predict import with_first_padding
from library.architectures.flux.reference import diffusers_model
from library.models.patches import patchify
from tests.parity.denoisers import assert_checkpointing_keeps_gradients
from tests.tiny.chroma import CONFIG, NUM_TEXT, inputs, oracle_output, tiny_chroma, velocity
from tests.tolerances import FLOAT32_DEEP


@pytest.mark.parametrize("size", [(8, 8), (4, 14), (18, 6)], ids=str)
@pytest.mark.parametrize("lengths", [None, (3, 7), (0, NUM_TEXT)], ids=["no mask", "two lengths", "none and all"])
def test_outputs_and_input_gradients_match_diffusers(size: tuple[int, int], lengths: tuple[int, int] | None) -> None:
    """The block counts are odd and different, so that modulation rows in the wrong order would show."""
    ours = tiny_chroma(21, replace(CONFIG, num_double=3, num_single=4))
    theirs = diffusers_model(ours)
    mask = None if lengths is None else torch.arange(NUM_TEXT) < torch.tensor(lengths)[:, None]
    mask = None if mask is None else with_first_padding(mask)
    results = []
    for run in (
        lambda *values: velocity(ours, *values, mask),
        lambda *values: oracle_output(theirs, *values, mask),
    ):
        latents, sigmas, text = inputs(*size)
        output = run(latents, sigmas, text)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(6))
        results.append((output, *torch.autograd.grad((output * weights).sum(), (latents, text))))
    for ours_value, theirs_value in zip(*results, strict=True):
        assert theirs_value.abs().max() > 0.1
        torch.testing.assert_close(ours_value, theirs_value, **FLOAT32_DEEP)


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


def test_gradient_checkpointing_does_not_change_gradients() -> None:
    def values() -> tuple[Tensor | None, ...]:
        return (*inputs(8, 6), None, torch.zeros(2))

    assert_checkpointing_keeps_gradients(tiny_chroma(24), values)


def test_blocks_compile_without_graph_breaks() -> None:
    model = tiny_chroma(25)
    expected = velocity(model, *inputs(8, 6))
    for block in (*model.double_blocks, *model.single_blocks):
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(velocity(model, *inputs(8, 6)), expected, **FLOAT32_DEEP)


def test_the_approximator_needs_no_gradient_unless_it_is_trained() -> None:
    model = tiny_chroma(26)
    rows = model.modulation(torch.tensor([0.5]), None, torch.zeros(1), torch.float32)
    assert not any(row.requires_grad for row in rows)
    model.distilled_guidance_layer.layers[1].in_layer.weight.requires_grad_()
    rows = model.modulation(torch.tensor([0.5]), None, torch.zeros(1), torch.float32)
    assert all(row.requires_grad for row in rows)
