"""Anima's denoiser against diffusers' CosmosTransformer3DModel and AnimaTextConditioner with the same weights."""

import torch

from tests.tiny.anima import inputs, oracle, tiny_anima
from tests.tolerances import FLOAT32_DEEP


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


def test_the_residual_stream_is_float32_with_float16_weights() -> None:
    model = tiny_anima(6).half()
    kinds = []
    model.blocks[1].register_forward_hook(lambda module, args, output: kinds.append((args[0].dtype, output.dtype)))
    values = [value.detach().half() if value.is_floating_point() else value for value in inputs(8, 6)]
    output = model(*values)
    assert kinds == [(torch.float32, torch.float32)]
    assert output.dtype == torch.float16
    assert output.isfinite().all()
