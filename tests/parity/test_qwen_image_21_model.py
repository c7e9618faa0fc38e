"""Qwen-Image 2.1's denoiser against diffusers' QwenImage21Transformer2DModel with the same weights."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.qwen_image_21.model import QwenImage21
from library.architectures.qwen_image_21.predict import predict
from library.architectures.qwen_image_21.reference import diffusers_model
from library.diffusion.references import reference_features
from library.types import Noised
from tests.tiny.qwen_image_21 import LENGTHS, PLACES, inputs, oracle_output, references, tiny_qwen_image_21
from tests.tolerances import FLOAT32_DEEP

SIZES = [(8, 8), (2, 6), (10, 4)]  # of the latent, each of whose pixels is a token


def our_output(
    model: QwenImage21, latents: Tensor, sigmas: Tensor, text: Tensor, mask: Tensor, shown: Sequence[Tensor] = ()
) -> Tensor:
    conditioning = {
        "hidden_state": text,
        "attention_mask": mask,
        "image_places": torch.tensor([PLACES[: len(shown)]] * len(mask), dtype=torch.long),
        **reference_features(shown),
    }
    batch: Any = None
    return predict(model, Noised(latents, latents, latents, sigmas, sigmas), conditioning, batch)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_and_input_gradients_match_diffusers(size: tuple[int, int], count: int) -> None:
    """The batch has captions of two lengths and references of other sizes at their positions."""
    ours = tiny_qwen_image_21(1)
    theirs, results = diffusers_model(ours), []
    for run, model in ((our_output, ours), (oracle_output, theirs)):
        latents, sigmas, text, mask = inputs(*size)
        shown = references(count)
        output = run(model, latents, sigmas, text, mask, shown)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        results.append((output, *torch.autograd.grad((output * weights).sum(), (latents, text, *shown))))
    for ours_value, theirs_value in zip(*results, strict=True):
        assert theirs_value.abs().max() > 0.01
        torch.testing.assert_close(ours_value, theirs_value, **FLOAT32_DEEP)


def test_clean_tokens_do_not_depend_on_the_noise_level() -> None:
    """Text and references are modulated at noise level 0 and never attend to the noisy image."""
    model, states = tiny_qwen_image_21(2), []
    latents, sigmas, text, mask = (value.detach() for value in inputs(4, 6))
    model.transformer_blocks[-1].register_forward_hook(lambda module, args, output: states.append(output))
    for scale in (1, 3):
        our_output(model, latents * scale, sigmas / scale, text, mask, references(1))
    num_clean = LENGTHS[0] + 8
    assert torch.equal(states[0][:, :num_clean], states[1][:, :num_clean])
    assert not torch.allclose(states[0][:, num_clean:], states[1][:, num_clean:])


def test_blocks_compile_without_graph_breaks() -> None:
    torch.compiler.reset()  # graphs compiled by other tests count toward the limit
    model = tiny_qwen_image_21(4)
    expected = our_output(model, *inputs(4, 6), references(2))
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(our_output(model, *inputs(4, 6), references(2)), expected, **FLOAT32_DEEP)
