"""Classifier-free guidance: away from what the model says to the negative prompt (Ho and Salimans 2022).

Letters: B samples, C channels, H height, W width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from library.types import Conditioning, Prompt


def guided(
    predict: Callable[[Conditioning], Tensor],
    positive: Conditioning,
    negative: Conditioning | None,
    prompt: Prompt,
    progress: float,
) -> Tensor:
    """The prediction for a prompt, float32, at the given share of its steps (above 0 at the first, 1 at the last).

    The two predictions are two calls of the model: the prompts need not be of one length, and no more memory is taken
    than by one picture. `negative` may be None where `needs_negative` says so.
    """
    positive_BCHW = predict(positive).float()
    if not needs_negative(prompt) or progress > (1.0 if prompt.cfg_trunc_ratio is None else prompt.cfg_trunc_ratio):
        return positive_BCHW
    assert negative is not None
    negative_BCHW = predict(negative).float()
    guided_BCHW = away_from(negative_BCHW, positive_BCHW, prompt.scale)
    return limit_length(guided_BCHW, positive_BCHW, prompt.renorm_cfg) if prompt.renorm_cfg else guided_BCHW


def away_from(negative_BCHW: Tensor, positive_BCHW: Tensor, scale: float) -> Tensor:
    """The way from what is said of the negative prompt to what is said of the other, `scale` times as far."""
    return negative_BCHW + scale * (positive_BCHW - negative_BCHW)


def needs_negative(prompt: Prompt) -> bool:
    """Whether the negative prompt is asked at all."""
    return prompt.scale > 1


def limit_length(guided_BCHW: Tensor, positive_BCHW: Tensor, limit: float) -> Tensor:
    """Shorten a guided prediction that has become longer than `limit` times the unguided one.

    The length is the norm over all values of a sample.
    """
    longest_B: Tensor = limit * torch.linalg.vector_norm(positive_BCHW.flatten(1), dim=1)
    length_B: Tensor = torch.linalg.vector_norm(guided_BCHW.flatten(1), dim=1)
    shares_B: Tensor = (longest_B / length_B.clamp(min=1e-12)).clamp(max=1.0)
    return guided_BCHW * shares_B.view(-1, 1, 1, 1)
