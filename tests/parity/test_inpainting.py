"""Inpainting models against diffusers' pipeline, and plain models before and after adding input channels."""

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
from tests.parity.test_preview import ours, pipeline_of, prompt_of
from tests.parity.test_step_loss import options_for
from tests.tiny.inpainting import widen_file, widen_folder
from tests.tolerances import EXACT, FLOAT32_SAMPLED


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
def test_latents_equal_those_of_the_pipeline(inpainting_folder: Path, tmp_path: Path, sampler: str) -> None:
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
