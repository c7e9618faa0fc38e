"""Previews are what the pipeline itself draws with the trained denoiser."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.any_pipeline.published import build_published, find_model
from tests.any_pipeline.test_training import SCRIPT, Train, arguments
from tests.tiny.pipelines import build_tiny_pipeline


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("AuraFlowPipeline", "guidance_scale"),
        ("StableDiffusionXLPipeline", "guidance_scale"),
        ("ZImagePipeline", "guidance_scale"),
        ("FluxPipeline", "true_cfg_scale"),
    ],
)
def test_a_preview_is_the_image_of_the_pipeline_with_the_file(
    name: str, scale: str, tmp_path: Path, train: Train
) -> None:
    build_tiny_pipeline(name).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red bird --w 64 --h 128 --s 3 --l 2.5 --n blurred --d 11\n")
    more = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "2", "--no_half_vae"]
    done = train(arguments(tmp_path / "model", tmp_path, *more), script=SCRIPT)
    assert done.status == 0 and "failed, training continues" not in done.stderr, done.stderr
    (drawn,) = (tmp_path / "out" / "sample").glob("*.png")
    pipe = build_tiny_pipeline(name)
    pipe.load_lora_weights(str(tmp_path / "out" / "mine.safetensors"))
    guided = {scale: 2.5, "negative_prompt": "blurred"}
    generator = torch.Generator().manual_seed(11)
    image = pipe("a red bird", width=64, height=128, num_inference_steps=3, generator=generator, **guided).images[0]
    pixels = [np.asarray(picture, dtype=float) for picture in (Image.open(drawn).convert("RGB"), image)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1.0  # rounding to whole values


VIDEOS = ("WanPipeline", "LTXPipeline", "HunyuanVideoPipeline", "CogVideoXPipeline", "SkyReelsV2Pipeline")


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.nightly) for name in VIDEOS])
def test_a_preview_of_a_video_model_is_the_one_frame_that_the_pipeline_draws_with_the_file(
    name: str, tmp_path: Path, train: Train
) -> None:
    build_published(find_model(name), name).save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red bird --w 64 --h 128 --s 3 --l 2.5 --n blurred --d 11\n")
    more = ["--sample_prompts", str(tmp_path / "prompts.txt"), "--sample_every_n_steps", "2", "--no_half_vae"]
    done = train(arguments(tmp_path / "model", tmp_path, *more), script=SCRIPT)
    assert done.status == 0 and "failed, training continues" not in done.stderr, done.stderr
    assert f"the adapter is loaded by load_lora_weights of {name}" in done.stderr
    (drawn,) = (tmp_path / "out" / "sample").glob("*.png")
    pipe = build_published(find_model(name), name)
    pipe.load_lora_weights(str(tmp_path / "out" / "mine.safetensors"))
    scale = "true_cfg_scale" if name == "HunyuanVideoPipeline" else "guidance_scale"
    drawing: dict[str, Any] = {scale: 2.5, "negative_prompt": "blurred", "width": 64, "height": 128}
    generator = torch.Generator().manual_seed(11)
    frames = pipe("a red bird", num_frames=1, num_inference_steps=3, generator=generator, output_type="np", **drawing)
    pixels = 255 * np.asarray(frames.frames[0])
    assert pixels.shape == (1, 128, 64, 3)
    assert np.abs(pixels[0] - np.asarray(Image.open(drawn).convert("RGB"), dtype=float)).max() <= 1.0  # whole values
