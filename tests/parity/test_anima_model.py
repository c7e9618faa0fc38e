"""Anima's denoiser against diffusers' CosmosTransformer3DModel and AnimaTextConditioner with the same weights."""

import pytest
import torch

from tests.parity.denoisers import assert_checkpointing_keeps_gradients
from tests.tiny.anima import inputs, oracle, tiny_anima
from tests.tolerances import FLOAT32_DEEP

SIZES = [(8, 8), (4, 14), (18, 6)]  # of the latent


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_and_input_gradients_match_diffusers(size: tuple[int, int]) -> None:
    ours = tiny_anima(1)
    results = []
    for run in (ours, oracle(ours)):
        values = inputs(*size)
        output = run(*values)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        gradients = torch.autograd.grad((output * weights).sum(), (values[0], values[2]))
        results.append((output, gradients[0], 10 * gradients[1]))  # few of the 512 positions are words
    for ours_value, theirs_value in zip(*results, strict=True):
        assert theirs_value.abs().max() > 0.1
        torch.testing.assert_close(ours_value, theirs_value, **FLOAT32_DEEP)


def test_an_empty_caption_matches_diffusers() -> None:
    ours = tiny_anima(2)
    latents, sigmas, source, source_mask, ids, mask = (value.detach() for value in inputs(8, 6))
    empty = source * 0, source_mask * 0
    got = ours(latents, sigmas, *empty, ids, mask)
    torch.testing.assert_close(got, oracle(ours)(latents, sigmas, *empty, ids, mask), **FLOAT32_DEEP)
    assert got.isfinite().all()
    assert not torch.allclose(got, ours(latents, sigmas, source, source_mask, ids, mask), rtol=1e-2)


def test_padding_after_a_caption_does_not_affect_outputs() -> None:
    ours = tiny_anima(3)
    latents, sigmas, source, source_mask, ids, mask = (value.detach() for value in inputs(8, 6))
    short = ours(latents[:1], sigmas[:1], source[:1, :5], source_mask[:1, :5], ids[:1], mask[:1])
    torch.testing.assert_close(
        ours(latents[:1], sigmas[:1], source[:1], source_mask[:1], ids[:1], mask[:1]), short, **FLOAT32_DEEP
    )
    short = ours(latents[1:], sigmas[1:], source[1:], source_mask[1:], ids[1:, :4], mask[1:, :4])
    torch.testing.assert_close(
        ours(latents[1:], sigmas[1:], source[1:], source_mask[1:], ids[1:], mask[1:]), short, **FLOAT32_DEEP
    )


def test_gradient_checkpointing_does_not_change_gradients() -> None:
    assert_checkpointing_keeps_gradients(tiny_anima(4), lambda: inputs(8, 6))


def test_blocks_compile_without_graph_breaks() -> None:
    model = tiny_anima(5)
    expected = model(*inputs(8, 6))
    for blocks in (model.blocks, model.llm_adapter.blocks):
        for block in blocks:
            block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(*inputs(8, 6)), expected, **FLOAT32_DEEP)


def test_the_residual_stream_is_float32_with_float16_weights() -> None:
    model = tiny_anima(6).half()
    kinds = []
    model.blocks[1].register_forward_hook(lambda module, args, output: kinds.append((args[0].dtype, output.dtype)))
    values = [value.detach().half() if value.is_floating_point() else value for value in inputs(8, 6)]
    output = model(*values)
    assert kinds == [(torch.float32, torch.float32)]
    assert output.dtype == torch.float16
    assert output.isfinite().all()
