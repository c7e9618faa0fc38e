"""Lumina Image 2.0's denoiser against diffusers' Lumina2Transformer2DModel with the same weights."""

import pytest
import torch

from library.architectures.lumina.reference import diffusers_model
from tests.parity.denoisers import assert_checkpointing_keeps_gradients
from tests.tiny.lumina import MASKS, inputs, oracle_output, tiny_lumina
from tests.tolerances import FLOAT32_DEEP

SIZES = [(8, 8), (4, 14), (18, 6)]  # of the latent


@pytest.mark.parametrize("tokens", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_and_input_gradients_match_diffusers(size: tuple[int, int], tokens: tuple[int, int]) -> None:
    ours = tiny_lumina(1)
    theirs = diffusers_model(ours)
    results = []
    for run in (ours, lambda *values: oracle_output(theirs, *values)):
        values = inputs(*size, tokens)
        output = run(*values)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        gradients = torch.autograd.grad((output * weights).sum(), (values[0], values[2]))
        results.append((output, *gradients))
    for ours_value, theirs_value in zip(*results, strict=True):
        assert theirs_value.abs().max() > 0.1
        torch.testing.assert_close(ours_value, theirs_value, **FLOAT32_DEEP)


def test_padding_does_not_affect_outputs() -> None:
    model = tiny_lumina(2)
    latents, times, text, mask = (value.detach() for value in inputs(8, 6, (5, 2)))
    expected = model(latents, times, text, mask)
    other = torch.where(mask.bool()[..., None], text, 100.0)
    torch.testing.assert_close(model(latents, times, other, mask), expected, **FLOAT32_DEEP)
    assert not torch.allclose(model(latents, times, text, torch.ones_like(mask)), expected, rtol=1e-2)


def test_gradient_checkpointing_does_not_change_gradients() -> None:
    assert_checkpointing_keeps_gradients(tiny_lumina(3), lambda: inputs(8, 6))


def test_blocks_compile_without_graph_breaks() -> None:
    torch.compiler.reset()  # graphs compiled by other tests count toward the limit
    model = tiny_lumina(4)
    expected = model(*inputs(8, 6))
    for block in (*model.context_refiner, *model.noise_refiner, *model.layers):
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(*inputs(8, 6)), expected, **FLOAT32_DEEP)
