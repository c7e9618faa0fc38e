"""Preview images against diffusers' pipeline with the same weights, scheduler, seed, prompt and scale."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from library.architectures.sd.assembly import build
from library.training.evaluation.drawing import decode, draw_latents, encode_prompts, seed_generator
from library.training.failures.vae_memory import VaeFallback
from library.training.reporting.sample_images import to_image
from library.types import Prompt
from tests.parity.test_step_loss import options_for
from tests.tolerances import FLOAT32_SAMPLED

SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "k_euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "k_dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}


def prompt_of(**values: Any) -> Prompt:
    settings: dict[str, Any] = {
        "text": "a red cat", "negative": "dog", "width": 64, "height": 96, "seed": 7, "num_steps": 6, "scale": 3.0,
        "sampler": "ddim", "guidance_scale": None, "cfg_trunc_ratio": None, "renorm_cfg": None, "flow_shift": None,
    }  # fmt: skip
    return Prompt(**{**settings, **values})


def run_of(folder: Path, **options: Any) -> Any:
    arch = build(options_for(folder, **options))
    models = SimpleNamespace(denoiser=arch.load.denoiser(), text_encoders=arch.load.text_encoders())
    return SimpleNamespace(arch=arch, models=models, device=torch.device("cpu"), autocast=nullcontext)


@torch.no_grad()
def ours(run: Any, prompt: Prompt) -> torch.Tensor:
    encoded = encode_prompts(run.arch, run.models.text_encoders, nullcontext, [prompt])
    latents_BCHW = draw_latents(run, prompt, encoded, seed_generator(prompt, 0, 0))
    assert latents_BCHW is not None
    return latents_BCHW


def pipeline_of(folder: Path, sampler: str, **settings: Any) -> Any:
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        str(folder), safety_checker=None, requires_safety_checker=False, local_files_only=True
    )
    class_name, scheduler_settings = SCHEDULERS[sampler]
    pipeline.scheduler = getattr(diffusers, class_name).from_config(
        pipeline.scheduler.config, **scheduler_settings, **settings
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(pipeline: Any, prompt: Prompt, output: str) -> Any:
    return pipeline(
        prompt.text, negative_prompt=prompt.negative, width=prompt.width, height=prompt.height,
        num_inference_steps=prompt.num_steps, guidance_scale=prompt.scale,
        generator=torch.Generator().manual_seed(prompt.seed or 0), output_type=output,
    ).images  # fmt: skip


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("scale", [pytest.param(1.0, marks=pytest.mark.nightly), 3.0])
def test_latents_equal_those_of_the_pipeline(tiny_sd_folder: Path, sampler: str, scale: float) -> None:
    """Scheduler and seed are equal; the pipeline batches both prompts while ours calls the model twice."""
    prompt = prompt_of(sampler=sampler, scale=scale)
    expected = theirs(pipeline_of(tiny_sd_folder, sampler), prompt, "latent")
    torch.testing.assert_close(ours(run_of(tiny_sd_folder), prompt), expected, **FLOAT32_SAMPLED)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmsolver++"])
def test_latents_of_v_prediction_models_with_zero_terminal_snr_match(tiny_sd_folder: Path, sampler: str) -> None:
    """diffusers rescales the betas itself in float32, and its DDIM never divides by the last abar, which is 0."""
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    prompt = prompt_of(sampler=sampler)
    expected = theirs(pipeline_of(tiny_sd_folder, sampler, **settings), prompt, "latent")
    run = run_of(tiny_sd_folder, v_parameterization=True, zero_terminal_snr=True)
    torch.testing.assert_close(ours(run, prompt), expected, **FLOAT32_SAMPLED)


def test_images_equal_those_of_the_pipeline(tiny_sd_folder: Path) -> None:
    """Values on the boundary between two shades may round either way."""
    prompt, run = prompt_of(sampler="euler"), run_of(tiny_sd_folder)
    expected = np.asarray(theirs(pipeline_of(tiny_sd_folder, "euler"), prompt, "pil")[0]).astype(int)
    with torch.no_grad():
        image = np.asarray(decode(run, run.arch.load.vae(), ours(run, prompt), VaeFallback())).astype(int)
    assert image.shape == (96, 64, 3)
    assert np.abs(image - expected).max() <= 1
    assert image.std() > 5  # an image, not one colour


def test_values_out_of_range_are_clipped() -> None:
    pixels_CHW = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).expand(3, 1, 5)
    assert np.asarray(to_image(pixels_CHW))[0, :, 0].tolist() == [0, 0, 128, 255, 255]
