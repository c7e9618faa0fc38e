"""Classifier-free guidance (Ho and Salimans 2022), and the training target of LECO.

Letters: B samples, C channels, H height, W width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from library.types import Conditioning, Prompt


def apply_guidance(
    predict: Callable[[Conditioning], Tensor],
    positive: Conditioning,
    negative: Conditioning | None,
    prompt: Prompt,
    progress: float,
) -> Tensor:
    """Return the guided prediction for a prompt, float32. `progress` is the share of steps up to and including this
    one, above 0 and at most 1.

    `negative` may be None unless `needs_negative`.
    """
    positive_BCHW = predict(positive).float()
    if not needs_negative(prompt) or not is_guided_at(prompt, progress):
        return positive_BCHW
    assert negative is not None
    # The model is called twice rather than once with both prompts: the prompts may differ in length, and the memory for
    # one image suffices.
    return guide(predict(negative).float(), positive_BCHW, prompt)


def is_guided_at(prompt: Prompt, progress: float) -> bool:
    return progress <= (1.0 if prompt.cfg_trunc_ratio is None else prompt.cfg_trunc_ratio)


def guide(negative_BCHW: Tensor, positive_BCHW: Tensor, prompt: Prompt) -> Tensor:
    """Combine the predictions for the negative prompt and the prompt by the prompt's guidance settings."""
    guided_BCHW = extrapolate(negative_BCHW, positive_BCHW, prompt.scale)
    return limit_length(guided_BCHW, positive_BCHW, prompt.renorm_cfg) if prompt.renorm_cfg else guided_BCHW


def extrapolate(negative_BCHW: Tensor, positive_BCHW: Tensor, scale: float) -> Tensor:
    return negative_BCHW + scale * (positive_BCHW - negative_BCHW)


def concept_target(neutral_BCHW: Tensor, positive_BCHW: Tensor, negative_BCHW: Tensor, push: float) -> Tensor:
    """Return neutral + push * (positive - negative), float32. A negative `push` erases the concept, a positive one
    enhances it.

    Sources: Gandikota et al. 2023, "Erasing Concepts from Diffusion Models" (ESD) and "Concept Sliders". The
    predictions are raw outputs of the denoiser: noise or velocity of a DDPM model, velocity of a flow. At one noise
    level each is linear in the estimate of the clean latent, so one formula serves all.
    """
    return neutral_BCHW.float() + push * (positive_BCHW.float() - negative_BCHW.float())


def needs_negative(prompt: Prompt) -> bool:
    """Return True if the prompt's guidance scale requires a negative prediction."""
    return prompt.scale > 1


def limit_length(guided_BCHW: Tensor, positive_BCHW: Tensor, limit: float) -> Tensor:
    """Scale a guided prediction down to at most `limit` times the norm of the unguided one, for each sample."""
    limits_B: Tensor = limit * torch.linalg.vector_norm(positive_BCHW.flatten(1), dim=1)
    norms_B: Tensor = torch.linalg.vector_norm(guided_BCHW.flatten(1), dim=1)
    # A prediction of zeros would divide 0 by 0.
    factors_B: Tensor = (limits_B / norms_B.clamp(min=1e-12)).clamp(max=1.0)
    return guided_BCHW * factors_B.view(-1, 1, 1, 1)
