"""Z-Image's denoiser against diffusers' ZImageTransformer2DModel with the same weights."""

import torch

from tests.tiny.zimage import inputs, tiny_zimage


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
