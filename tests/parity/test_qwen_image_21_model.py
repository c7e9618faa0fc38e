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
from tests.parity.denoisers import assert_checkpointing_keeps_gradients
from tests.tiny.qwen_image_21 import CONFIG, tiny_qwen_image_21
from tests.tolerances import FLOAT32_DEEP

SIZES = [(8, 8), (2, 6), (10, 4)]  # of the latent, each of whose pixels is a token
LENGTHS = (24, 13)
SHOWN = ((4, 2), (2, 6))  # sizes of two reference images
PLACES = (5, 9)  # number of text tokens before each reference


def inputs(h: int, w: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return latents, noise levels, text, and its mask."""
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(2, CONFIG.in_features, h, w, generator=g).requires_grad_()
    text = torch.randn(2, LENGTHS[0], CONFIG.text_width, generator=g).requires_grad_()
    mask = torch.arange(LENGTHS[0])[None] < torch.tensor(LENGTHS)[:, None]
    return latents, torch.tensor([0.125, 0.875]), text, mask.long()


def references(count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(8)
    return [torch.randn(2, CONFIG.in_features, *side, generator=g).requires_grad_() for side in SHOWN[:count]]


def oracle_output(
    theirs: Any, latents: Tensor, sigmas: Tensor, text: Tensor, mask: Tensor, shown: Sequence[Tensor] = ()
) -> Tensor:
    """Run samples separately without padding, as diffusers places the image after the longest caption of a batch."""
    outputs = []
    for b, length in enumerate(mask.sum(1).tolist()):
        images = [image[b : b + 1].flatten(2).transpose(1, 2) for image in (*shown, latents)]
        sides = [(1, *image.shape[-2:]) for image in (*shown, latents)]
        is_slot = torch.zeros(0, dtype=torch.bool)
        states, last = text.new_zeros(1, 0, text.shape[2]), 0
        for place, (_, h, w) in zip((*PLACES[: len(shown)], length), sides, strict=True):
            num_slots = h * w // 4
            is_text = [torch.zeros(place - last, dtype=torch.bool), torch.ones(num_slots, dtype=torch.bool)]
            is_slot = torch.cat([is_slot, *is_text])
            slots = text.new_zeros(1, num_slots if place < length else 0, text.shape[2])  # for the image
            states, last = torch.cat([states, text[b : b + 1, last:place], slots], dim=1), place
        tokens = theirs(
            torch.cat(images, dim=1),
            encoder_hidden_states=states,
            timestep=sigmas[b : b + 1],
            img_shapes=[sides],
            img_mask=is_slot[None],
            return_dict=False,
        )[0]
        outputs.append(tokens[:, -images[-1].shape[1] :].transpose(1, 2).reshape(latents[b : b + 1].shape))
    return torch.cat(outputs)


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


def test_gradient_checkpointing_does_not_change_gradients() -> None:
    assert_checkpointing_keeps_gradients(tiny_qwen_image_21(3), lambda: inputs(4, 6))


def test_blocks_compile_without_graph_breaks() -> None:
    torch.compiler.reset()  # graphs compiled by other tests count toward the limit
    model = tiny_qwen_image_21(4)
    expected = our_output(model, *inputs(4, 6), references(2))
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(our_output(model, *inputs(4, 6), references(2)), expected, **FLOAT32_DEEP)
