"""SD3's previews against diffusers' StableDiffusion3Pipeline: the same weights, prompts and seed, text to latents."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.architectures.sd3.assembly import build
from library.types import Prompt
from tests.parity.test_preview import ours
from tests.tiny.sd3 import CONFIGS, build_tiny_sd3, diffusers_mmdit
from tests.tolerances import FLOAT32_SAMPLED
from tests.unit.architectures.sd3.test_load import options_of

NUM_TOKENS = 24


def pipeline_of(arch: Any, denoiser: Any, encoders: list[Any], folder: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTokenizer, T5TokenizerFast

    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    giant = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    giant.pad_token_id = 0  # OpenCLIP's padding, as in the pipeline's tokenizer_2
    pipeline = StableDiffusion3Pipeline(
        transformer=diffusers_mmdit(denoiser.config, denoiser.state_dict()),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=arch.load.vae(),
        text_encoder=encoders[0],
        tokenizer=clip,
        text_encoder_2=encoders[1],
        tokenizer_2=giant,
        text_encoder_3=encoders[2],
        tokenizer_3=T5TokenizerFast.from_pretrained(folder / "tokenizer_3"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("scale", [1.0, 4.5])
@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium"])
def test_latents_equal_those_of_the_pipeline(tmp_path: Path, name: str, scale: float) -> None:
    assert name in CONFIGS
    arch = build(options_of(build_tiny_sd3(tmp_path, 9, name), t5xxl_max_token_length=NUM_TOKENS))
    denoiser, encoders = arch.load.denoiser(), arch.load.text_encoders()
    models = SimpleNamespace(denoiser=denoiser, text_encoders=encoders)
    run: Any = SimpleNamespace(arch=arch, models=models, device=torch.device("cpu"), autocast=nullcontext)
    prompt = Prompt(
        text="a red cat", negative="dog", width=64, height=96, seed=7, num_steps=4, scale=scale, sampler=None,
        guidance_scale=None, cfg_trunc_ratio=None, renorm_cfg=None, flow_shift=arch.preview.defaults.flow_shift,
    )  # fmt: skip
    expected = pipeline_of(arch, denoiser, encoders, tmp_path)(
        prompt.text, negative_prompt=prompt.negative, guidance_scale=scale, width=prompt.width, height=prompt.height,
        num_inference_steps=prompt.num_steps, generator=torch.Generator().manual_seed(7),
        max_sequence_length=NUM_TOKENS, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(ours(run, prompt), expected, **FLOAT32_SAMPLED)
