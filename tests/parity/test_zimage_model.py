"""Z-Image's denoiser against diffusers' ZImageTransformer2DModel with the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.zimage.reference import diffusers_model
from tests.parity.denoisers import assert_recomputing_changes_no_gradient
from tests.tiny.zimage import CONFIG, tiny_zimage
from tests.tolerances import FLOAT32_DEEP

SIZES = [(16, 16), (4, 14), (18, 6)]  # of the latent: 64 tokens, 28 and 27, which are filled up
NUM_TEXT = 40
LENGTHS = {"whole": (40, 40), "multiple": (32, 32), "one multiple": (5, 31), "uneven": (3, 40)}  # of the captions


def inputs(H: int, W: int, lengths: tuple[int, int] = LENGTHS["whole"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, times, text, which of it is the caption."""
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, H, W, generator=g).requires_grad_()
    text = torch.randn(2, NUM_TEXT, CONFIG.text_width, generator=g).requires_grad_()
    mask = torch.tensor([[1] * n + [0] * (NUM_TEXT - n) for n in lengths])
    return latents, torch.tensor([0.125, 0.875]), text, mask


def oracle_output(theirs: Any, latents: Tensor, times: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Captions are a list of their tokens alone, images a list of videos with one frame."""
    captions = [states[: int(own.sum())] for states, own in zip(text, mask, strict=True)]
    frames = theirs(list(latents[:, :, None]), times, captions, return_dict=False)[0]
    return torch.stack(frames)[:, :, 0]


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_and_input_gradients_are_those_of_diffusers(size: tuple[int, int], lengths: tuple[int, int]) -> None:
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


def test_learned_tokens_fill_captions_and_images() -> None:
    """Both are attended to: other values of either give other outputs where something is filled, and only there."""
    latents, times, text, mask = (value.detach() for value in inputs(4, 14, (5, 5)))
    model = tiny_zimage(2)
    expected, unfilled = model(latents, times, text, mask), model(*inputs(16, 16, (32, 32)))
    for token in (model.cap_pad_token, model.x_pad_token):
        kept = token.clone()
        token.mul_(-1)
        assert not torch.allclose(model(latents, times, text, mask), expected, rtol=1e-2)
        torch.testing.assert_close(model(*inputs(16, 16, (32, 32))), unfilled, rtol=0, atol=0)
        token.copy_(kept)


def test_padding_of_captions_has_no_part_in_anything() -> None:
    model = tiny_zimage(2)
    latents, times, text, mask = (value.detach() for value in inputs(8, 6, (5, 40)))
    other = torch.where(mask.bool()[..., None], text, 100.0)
    expected = model(latents, times, text, mask)
    torch.testing.assert_close(model(latents, times, other, mask), expected, rtol=0, atol=0)


def test_recomputing_blocks_changes_no_gradient() -> None:
    assert_recomputing_changes_no_gradient(tiny_zimage(3), lambda: inputs(8, 6))


def test_blocks_compile_without_a_break_in_the_graph() -> None:
    torch.compiler.reset()  # what other tests compiled counts toward its limit
    model = tiny_zimage(4)
    expected = model(*inputs(8, 6))
    for block in (*model.context_refiner, *model.noise_refiner, *model.layers):
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(model(*inputs(8, 6)), expected, **FLOAT32_DEEP)
