"""Classifier-free guidance."""

from typing import Any

import torch
from torch import Tensor

from library.diffusion.guidance import apply_guidance
from library.types import Conditioning, Prompt
from tests.tolerances import FLOAT32_SAME_MATH

POSITIVE, NEGATIVE = torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([[[[1.0, 4.0]]]])


def prompt_of(**values: Any) -> Prompt:
    unset = dict.fromkeys(("sampler", "guidance_scale", "cfg_trunc_ratio", "renorm_cfg", "flow_shift"))
    common = {"text": "a", "negative": "b", "width": 64, "height": 64, "seed": 1, "num_steps": 4, "scale": 2.0}
    return Prompt(**{**common, **unset, **values})  # type: ignore[arg-type]


def guide(progress: float = 0.5, **values: Any) -> tuple[Tensor, int]:
    """Return the guided prediction and the number of model calls."""
    calls = []

    def predict(conditioning: Conditioning) -> Tensor:
        calls.append(conditioning)
        return conditioning["x"]

    prediction = apply_guidance(predict, {"x": POSITIVE}, {"x": NEGATIVE}, prompt_of(**values), progress)
    return prediction, len(calls)


def test_guidance_moves_away_from_the_negative_prompt() -> None:
    assert guide()[0].flatten().tolist() == [5.0, -4.0]  # 1 + 2 * (3 - 1), 4 + 2 * (0 - 4)


def test_without_guidance_the_model_is_called_once() -> None:
    prediction, num_calls = guide(scale=1.0)
    assert num_calls == 1 and torch.equal(prediction, POSITIVE)


def test_guidance_ends_after_cfg_trunc_ratio_of_the_steps() -> None:
    assert guide(0.25, cfg_trunc_ratio=0.25)[1] == 2
    prediction, num_calls = guide(0.5, cfg_trunc_ratio=0.25)
    assert num_calls == 1 and torch.equal(prediction, POSITIVE)


def test_renorm_cfg_limits_the_norm_of_the_prediction() -> None:
    plain, limited, loose = (guide(renorm_cfg=limit)[0] for limit in (0.0, 1.0, 10.0))
    assert torch.equal(plain, loose)
    torch.testing.assert_close(limited.norm(), POSITIVE.norm(), **FLOAT32_SAME_MATH)
    torch.testing.assert_close(limited / limited.norm(), plain / plain.norm(), **FLOAT32_SAME_MATH)
