"""Flow models train toward what their previews follow: the same prediction, and a target between noise and latent."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.test_preview import prompt_of
from tests.parity.tiny_models import open_run
from tests.tiny.bases import BASES


@pytest.mark.parametrize("name", [name for name, base in BASES.items() if base.dit is not None or name == "lumina"])
@torch.no_grad()
def test_training_target_is_the_velocity_that_previews_follow(name: str, tmp_path: Path) -> None:
    """The tests of whole previews compare that prediction with diffusers'."""
    run, batch = open_run(name, BASES[name].build(tmp_path)), None
    text, objective, preview = run.arch.text, run.arch.objective, run.arch.preview
    clean = torch.randn(2, run.arch.codec.spec.channels, 8, 6, generator=torch.Generator().manual_seed(1))
    noised = objective.corrupt(clean, torch.Generator().manual_seed(2))
    conditioning = text.encode(run.models.text_encoders, text.tokenize(["a cat", "red dog, cat"]))
    inputs: Any = (run.models.denoiser, noised, conditioning, batch)
    predict = preview.predict(prompt_of(sampler=None, guidance_scale=1.0, cfg_trunc_ratio=1.0, renorm_cfg=0.0))
    torch.testing.assert_close(predict(*inputs), run.arch.predict(*inputs), rtol=0, atol=0)
    velocity = noised.noise_BCHW - noised.clean_BCHW
    target = -velocity if BASES[name].is_velocity_reversed else velocity
    torch.testing.assert_close(objective.target(noised), target, rtol=0, atol=0)
    s = noised.sigmas_B.view(-1, 1, 1, 1)
    torch.testing.assert_close(noised.latents_BCHW, (1 - s) * clean + s * noised.noise_BCHW, rtol=0, atol=1e-6)
