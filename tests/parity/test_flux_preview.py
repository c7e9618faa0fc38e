"""FLUX.1's previews against diffusers' FluxPipeline: the same folder, prompts and seed, from text to latents."""

from pathlib import Path
from typing import Any

import pytest
import torch

from library.architectures.flux.model import PATCH
from library.models.patches import patchify
from library.types import Prompt
from tests.parity.test_preview import ours
from tests.parity.tiny_models import open_run
from tests.tiny.flux import build_tiny_flux
from tests.tolerances import FLOAT32_SAMPLED

NUM_TOKENS = 24


def run_of(arguments: list[str]) -> Any:
    return open_run("flux", [*arguments, "--t5xxl_max_token_length", str(NUM_TOKENS), "--model_prediction_type", "raw"])


def pipeline_of(folder: Path, is_shifted: bool) -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=is_shifted, shift=3.0 if is_shifted else 1.0, base_shift=0.5, max_shift=1.15
        ),
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(folder / "text_encoder_2"),
        tokenizer_2=T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
        transformer=FluxTransformer2DModel.from_pretrained(folder / "transformer"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("has_guidance", "scale"), [(True, 1.0), (True, 2.5), (False, 1.0)], ids=["dev", "dev with negative", "schnell"]
)
def test_latents_equal_those_of_the_pipeline(tmp_path: Path, has_guidance: bool, scale: float) -> None:
    arguments = build_tiny_flux(tmp_path, 9, "diffusers", has_guidance)
    prompt = Prompt(
        text="a red cat", negative="dog", width=64, height=96, seed=7, num_steps=4, scale=scale, sampler=None,
        guidance_scale=2.0 if has_guidance else None, cfg_trunc_ratio=None, renorm_cfg=None, flow_shift=None,
    )  # fmt: skip
    expected = pipeline_of(tmp_path, is_shifted=has_guidance)(
        prompt.text, negative_prompt=prompt.negative if scale > 1 else None, true_cfg_scale=scale, width=prompt.width,
        height=prompt.height, num_inference_steps=prompt.num_steps, guidance_scale=2.0,
        generator=torch.Generator().manual_seed(7), max_sequence_length=NUM_TOKENS, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(patchify(ours(run_of(arguments), prompt), PATCH), expected, **FLOAT32_SAMPLED)
