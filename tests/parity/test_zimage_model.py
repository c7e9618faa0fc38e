"""Z-Image's denoiser against diffusers' ZImageTransformer2DModel with the same weights."""

import pytest
import torch

from library.architectures.zimage.reference import diffusers_model
from tests.parity.denoisers import assert_checkpointing_keeps_gradients
from tests.tiny.zimage import LENGTHS, inputs, oracle_output, tiny_zimage
from tests.tolerances import FLOAT32_DEEP

SIZES = [(16, 16), (4, 14), (18, 6)]  # of the latent: 64, 28 and 27 tokens; the last two are padded


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_and_input_gradients_match_diffusers(size: tuple[int, int], lengths: tuple[int, int]) -> None:
    ours = tiny_zimage(1)
    theirs = diffusers_model(ours)
    results = []
    for run in (ours, lambda *values: oracle_output(theirs, *values)):
        values = inputs(*size, lengths)
        output = run(*values)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        gradients = torch.autograd.grad((output * weights).sum(), (values[0], values[2]))
        results.append((output, *gradients))
    for ours_value, theirs_value in zip(*results, strict=True):
        assert theirs_value.abs().max() > 0.1
        torch.testing.assert_close(ours_value, theirs_value, **FLOAT32_DEEP)


def test_learned_padding_tokens_extend_captions_and_images() -> None:
    """Both are attended to: changing either changes the outputs exactly where padding is used."""
    latents, times, text, mask = (value.detach() for value in inputs(4, 14, (5, 5)))
    model = tiny_zimage(2)
    expected, unfilled = model(latents, times, text, mask), model(*inputs(16, 16, (32, 32)))
    for token in (model.cap_pad_token, model.x_pad_token):
        original = token.clone()
        token.mul_(-1)
        assert not torch.allclose(model(latents, times, text, mask), expected, rtol=1e-2)
        torch.testing.assert_close(model(*inputs(16, 16, (32, 32))), unfilled, rtol=0, atol=0)
        token.copy_(original)


def test_masked_caption_padding_does_not_affect_outputs() -> None:
    model = tiny_zimage(2)
    latents, times, text, mask = (value.detach() for value in inputs(8, 6, (5, 40)))
    other = torch.where(mask.bool()[..., None], text, 100.0)
    expected = model(latents, times, text, mask)
    torch.testing.assert_close(model(latents, times, other, mask), expected, rtol=0, atol=0)


def test_gradient_checkpointing_does_not_change_gradients() -> None:
    assert_checkpointing_keeps_gradients(tiny_zimage(3), lambda: inputs(8, 6))


def test_blocks_compile_without_graph_breaks() -> None:
    torch.compiler.reset()  # graphs compiled by other tests count toward the limit
    model = tiny_zimage(4)
    expected = model(*inputs(8, 6))
    for block in (*model.context_refiner, *model.noise_refiner, *model.layers):
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(*inputs(8, 6)), expected, **FLOAT32_DEEP)
