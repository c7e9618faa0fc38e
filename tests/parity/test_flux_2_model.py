"""FLUX.2's denoiser against diffusers' Flux2Transformer2DModel with the same weights."""

from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.flux_2.predict import predict
from library.architectures.flux_2.reference import diffusers_model
from library.diffusion.references import reference_features
from library.types import Noised
from tests.tiny.flux_2 import CONFIG, inputs, tiny_flux_2
from tests.tolerances import FLOAT32_DEEP

SIZES = [(8, 8), (3, 7), (9, 2)]  # of the latent, each of whose pixels is a token


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference_positions_and_attention_match_diffusers(size: tuple[int, int]) -> None:
    """Two references of other sizes follow the noisy tokens in `predict`, as in the pipeline of diffusers."""
    from diffusers import Flux2Pipeline as Pipeline

    ours = tiny_flux_2(6, True)
    theirs = diffusers_model(ours)
    g = torch.Generator().manual_seed(8)
    references = [torch.randn(2, CONFIG.in_features, *side, generator=g).requires_grad_() for side in ((4, 3), (2, 9))]

    def our_output(latents: Tensor, sigmas: Tensor, text: Tensor) -> Tensor:
        conditioning = {"hidden_state": text, **reference_features(references)}
        batch: Any = None
        return predict(ours, Noised(latents, latents, latents, sigmas, sigmas), conditioning, batch, guidance=4.0)

    def their_output(latents: Tensor, sigmas: Tensor, text: Tensor) -> Tensor:
        placed = Pipeline._prepare_image_ids([reference[:1] for reference in references]).expand(2, -1, -1)
        tokens = theirs(
            torch.cat([Pipeline._pack_latents(image) for image in (latents, *references)], dim=1),
            encoder_hidden_states=text,
            timestep=sigmas,
            img_ids=torch.cat([Pipeline._prepare_latent_ids(latents), placed], dim=1),
            txt_ids=Pipeline._prepare_text_ids(text),
            guidance=torch.full((2,), 4.0),
            return_dict=False,
        )[0]
        return tokens[:, : latents.shape[-2] * latents.shape[-1]].transpose(1, 2).reshape(latents.shape)  # type: ignore[no-any-return]

    results = []
    for run in (our_output, their_output):
        latents, sigmas, text, _ = inputs(*size)
        output = run(latents, sigmas, text)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        results.append((output, *torch.autograd.grad((output * weights).sum(), (latents, text, *references))))
    for ours_value, theirs_value in zip(*results, strict=True):
        assert theirs_value.abs().max() > 0.01
        torch.testing.assert_close(ours_value, theirs_value, **FLOAT32_DEEP)


def test_guidance_affects_only_dev() -> None:
    latents, sigmas, text, guidance = (value.detach() for value in inputs(4, 6))
    for is_dev in (False, True):
        model = tiny_flux_2(2, is_dev)
        is_same = torch.equal(model(latents, sigmas, text, guidance), model(latents, sigmas, text, 2 * guidance))
        assert is_same != is_dev
