"""Previews, also of inpainting models, against diffusers' pipelines with the same weights and seeds."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.architectures.sd.assembly import build
from library.architectures.sdxl.assembly import build as build_sdxl
from library.architectures.sdxl.options import SdxlOptions
from library.diffusion.inpainting import draw_mask
from library.training.evaluation.drawing import decode, draw_latents, encode_prompts, seed_generator
from library.training.failures.vae_memory import VaeFallback
from library.training.reporting.sample_images import to_image
from library.types import Prompt
from tests.parity.test_step_loss import options_for
from tests.tiny.inpainting import widen_file, widen_folder
from tests.tolerances import EXACT, FLOAT32_SAMPLED

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


# Inpainting models against diffusers' pipeline, and plain models before and after adding input channels.


@pytest.fixture(scope="module")
def inpainting_folder(tiny_sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return widen_folder(tiny_sd_folder, tmp_path_factory.mktemp("inpainting") / "model", seed=31)


def without_noise(vae: Any) -> Any:
    """Make the VAE's posterior deterministic, so that different random draws give the same sample."""
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -60
    return vae


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_latents_of_inpainting_equal_those_of_the_pipeline(
    inpainting_folder: Path, tmp_path: Path, sampler: str
) -> None:
    import diffusers

    rng = np.random.default_rng(32)
    mask = draw_mask(64, 96, rng)
    rgb = rng.integers(0, 256, (96, 64, 3), dtype=np.uint8)
    image = Image.fromarray(np.dstack([rgb, np.where(mask > 0, 0, 255).astype(np.uint8)]))
    image.save(tmp_path / "shown.png")
    parts = pipeline_of(inpainting_folder, sampler).components
    pipeline = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    without_noise(pipeline.vae)
    prompt = prompt_of(sampler=sampler, image_path=tmp_path / "shown.png")
    expected = pipeline(
        prompt.text, negative_prompt=prompt.negative, width=64, height=96, num_inference_steps=prompt.num_steps,
        image=image.convert("RGB"), mask_image=Image.fromarray((mask * 255).astype(np.uint8)), strength=1.0,
        guidance_scale=prompt.scale, generator=torch.Generator().manual_seed(7), output_type="latent",
    ).images  # fmt: skip
    arch = build(options_for(inpainting_folder, train_inpainting=True))
    vae = without_noise(arch.load.vae())
    models = SimpleNamespace(denoiser=arch.load.denoiser(), text_encoders=arch.load.text_encoders(), vae=vae)
    run = SimpleNamespace(arch=arch, models=models, device=torch.device("cpu"), autocast=nullcontext, vae_batch_size=1)
    actual = ours(run, prompt)
    torch.testing.assert_close(actual, expected, **FLOAT32_SAMPLED)
    Image.fromarray(rgb[::-1].copy()).save(tmp_path / "shown.png")
    assert (ours(run, prompt) - expected).abs().max() > 0.01  # another image, another mask


def test_a_single_file_gives_the_same_model_as_a_folder(
    inpainting_folder: Path, tiny_sd_file: Path, tmp_path: Path
) -> None:
    file = widen_file(tiny_sd_file, tmp_path / "file", seed=31)
    expected, other = (
        build(options_for(path, train_inpainting=True)).load.denoiser().state_dict()
        for path in (inpainting_folder, file)
    )
    assert expected.keys() == other.keys() and expected["conv_in.weight"].shape[1] == 9
    for name, weight in expected.items():
        torch.testing.assert_close(weight, other[name], **EXACT)


@pytest.mark.parametrize("base", ["sd", "sdxl"])
def test_adding_input_channels_to_a_plain_model_keeps_its_output(
    base: str, tiny_sd_folder: Path, tiny_sdxl_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The output is independent of the mask, as the new channels start at zero."""
    if base == "sd":
        plain, wide = (build(options_for(tiny_sd_folder, train_inpainting=on)) for on in (False, True))
    else:
        import argparse

        parser = argparse.ArgumentParser()
        SdxlOptions.add_to(parser)
        words = ["--pretrained_model_name_or_path", str(tiny_sdxl_folder)]
        plain, wide = (
            build_sdxl(SdxlOptions.from_args(parser.parse_args([*words, *more])))
            for more in ([], ["--train_inpainting"])
        )
    assert "takes 4 channels, so it cannot use masks" in caplog.text
    generator = torch.Generator().manual_seed(33)
    latents = torch.randn(2, 4, 8, 12, generator=generator)
    mask_channels = torch.randn(2, 5, 8, 12, generator=generator)
    # Use one memory layout: channels-last convolutions of 4 and 9 channels sum in different orders.
    first, second = (arch.load.denoiser().to(memory_format=torch.contiguous_format) for arch in (plain, wide))
    width = first.config.cross_attention_dim
    conditions: dict[str, Any] = {"encoder_hidden_states": torch.randn(2, 77, width, generator=generator)}
    if base == "sdxl":
        pooled = first.config.projection_class_embeddings_input_dim - 6 * first.config.addition_time_embed_dim
        conditions["added_cond_kwargs"] = {
            "text_embeds": torch.randn(2, pooled, generator=generator),
            "time_ids": torch.full((2, 6), 64.0),
        }
    times = torch.tensor([12, 803])
    with torch.no_grad():
        wanted = first(latents, times, **conditions).sample
        actual = second(torch.cat([latents, mask_channels], 1), times, **conditions).sample
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)  # equal sums plus zeros
