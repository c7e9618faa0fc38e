"""Krea 2 from text to latents and images against diffusers' pipeline: the same folder, prompts and seed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from library.architectures.krea2.text import BEGIN
from library.data.decoding.tensors import to_pixels
from library.types import CaptionWithImages, Prompt
from tests.parity.test_preview import ours
from tests.parity.tiny_models import open_run
from tests.tiny.krea2 import build_tiny_krea2
from tests.tolerances import FLOAT32_DEEP, FLOAT32_SAMPLED

PROMPT = Prompt(
    text="a red cat", negative="a dog", width=64, height=96, seed=7, num_steps=5, scale=4.0, sampler=None,
    guidance_scale=None, cfg_trunc_ratio=None, renorm_cfg=None, flow_shift=None,
)  # fmt: skip
CAPTIONS = ["a red cat, sitting", "", "dog " * 600]


def run_of(folder: Path, *more: str) -> Any:
    return open_run("krea2", ["--pretrained_model_name_or_path", str(folder), *more])


def pipeline_of(folder: Path, is_distilled: bool) -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        Krea2Pipeline,
        Krea2Transformer2DModel,
    )
    from transformers import Qwen2Tokenizer, Qwen3VLModel

    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer", padding_side="right")
    pipeline: Any = Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type="exponential", base_shift=0.5, max_shift=1.15,
            base_image_seq_len=256, max_image_seq_len=6400,
        ),
        vae=AutoencoderKLQwenImage.from_pretrained(folder / "vae"),
        text_encoder=Qwen3VLModel.from_pretrained(folder / "text_encoder"),
        tokenizer=tokenizer,
        transformer=Krea2Transformer2DModel.from_pretrained(folder / "transformer"),
        is_distilled=is_distilled,
    )  # fmt: skip
    # The tiny tokenizer has few words, so the template takes more tokens.
    pipeline.prompt_template_encode_start_idx = len(tokenizer(pipeline.prompt_template_encode_prefix)["input_ids"])
    pipeline.prompt_template_encode_num_suffix_tokens = len(
        tokenizer(pipeline.prompt_template_encode_suffix)["input_ids"]
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("krea2")
    build_tiny_krea2(path, 9, "diffusers")
    return path


@pytest.fixture(scope="module")
def run(folder: Path) -> Any:
    return run_of(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return pipeline_of(folder, is_distilled=False)


@pytest.mark.parametrize("is_turbo", [False, True], ids=["raw", "turbo"])
@pytest.mark.parametrize("size", [(64, 96), (320, 64)], ids=str)
def test_latents_equal_those_of_the_pipeline(folder: Path, is_turbo: bool, size: tuple[int, int]) -> None:
    """Raw uses guidance, which diffusers counts from 0; Turbo uses none, and the same shift at every size."""
    run = run_of(folder, "--dit_variant", "turbo" if is_turbo else "raw")
    scale = 1.0 if is_turbo else PROMPT.scale
    prompt = replace(PROMPT, width=size[0], height=size[1], scale=scale)
    theirs = pipeline_of(folder, is_turbo)
    expected = theirs(
        prompt=prompt.text, negative_prompt=prompt.negative, width=size[0], height=size[1],
        num_inference_steps=prompt.num_steps, guidance_scale=scale - 1, generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images  # fmt: skip
    actual = theirs._pack_latents(ours(run, prompt), 1, 16, size[1] // 8, size[0] // 8)
    torch.testing.assert_close(actual, expected, **FLOAT32_SAMPLED)


@pytest.mark.parametrize(("variant", "steps", "scale"), [("raw", 28, 5.5), ("turbo", 8, 1.0)])
def test_previews_use_the_settings_of_the_variant(folder: Path, variant: str, steps: int, scale: float) -> None:
    defaults = run_of(folder, "--dit_variant", variant).arch.preview.defaults
    assert (defaults.num_steps, defaults.scale, defaults.width, defaults.height) == (steps, scale, 1024, 1024)


def test_caption_features_equal_those_of_the_pipeline(run: Any, pipeline: Any) -> None:
    """Features are compared at all tokens except padding, which the pipeline puts before the end of the template."""
    text, encoders = run.arch.text, run.models.text_encoders
    features = text.encode(encoders, text.tokenize(CAPTIONS))
    theirs, is_token = pipeline.encode_prompt(list(CAPTIONS), device=torch.device("cpu"))
    assert features["attention_mask"].sum(1).tolist() == is_token.sum(1).tolist()
    assert int(features["attention_mask"].sum(1).max()) == 512 == theirs.shape[1]
    for number in range(len(CAPTIONS)):
        actual = features["hidden_state"][number][features["attention_mask"][number].bool()]
        torch.testing.assert_close(actual, theirs[number][is_token[number]].flatten(1), **FLOAT32_DEEP)
        assert not features["hidden_state"][number][~features["attention_mask"][number].bool()].any()
    alone = text.encode(encoders, text.tokenize(CAPTIONS[:1]))["hidden_state"]
    torch.testing.assert_close(alone[0], features["hidden_state"][0, : alone.shape[1]], **FLOAT32_DEEP)


@torch.no_grad()
def test_captions_with_references_give_the_states_of_the_whole_model(run: Any, folder: Path) -> None:
    """They are not cut, nor are their references, which the denoiser gets too."""
    from transformers import Qwen3VLModel
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    generator = np.random.default_rng(1)
    images = [generator.integers(0, 256, (*sides, 3), dtype=np.uint8) for sides in ((32, 64), (64, 96))]
    processor = Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": 32 * 32, "longest_edge": 384 * 384},
    )  # fmt: skip
    patches, text = processor([Image.fromarray(image) for image in images], return_tensors="pt"), run.arch.text
    caption = "a red cat " * 300
    pictures = "".join(
        f"Picture {n}: <|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for n, count in ((1, 2), (2, 6))
    )
    chat = f"{BEGIN}{pictures}{caption}<|im_end|>\n<|im_start|>assistant\n"
    ids = text.tokenizer(chat, return_tensors="pt")["input_ids"]
    is_slot = ids == text.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    states = Qwen3VLModel.from_pretrained(folder / "text_encoder").eval()(
        input_ids=ids, pixel_values=patches["pixel_values"], image_grid_thw=patches["image_grid_thw"],
        mm_token_type_ids=is_slot.int(), output_hidden_states=True,
    ).hidden_states  # fmt: skip
    theirs = torch.cat([states[layer][0] for layer in range(2, 36, 3)], dim=-1)[text.num_begin :]
    shown = CaptionWithImages(caption, "digest", lambda: tuple(map(to_pixels, images)))
    features = text.encode(run.models.text_encoders, text.tokenize([shown, "dog"]))
    assert len(theirs) > 512
    torch.testing.assert_close(features["hidden_state"][0], theirs, **FLOAT32_DEEP)
    alone = text.encode(run.models.text_encoders, text.tokenize(["dog"]))["hidden_state"][0]
    torch.testing.assert_close(features["hidden_state"][1, : len(alone)], alone, **FLOAT32_DEEP)


def test_unused_layers_are_not_loaded(run: Any) -> None:
    encoder, _ = run.models.text_encoders
    assert len(encoder.layers) == 35


def test_caption_tokens_are_counted_without_the_template(run: Any) -> None:
    text = run.arch.text
    ids, mask = text.tokenize(["a red cat"]).ids_BLT
    assert int(mask.sum()) == text.num_begin + text.count_tokens("a red cat") + len(text.end)
    assert text.max_tokens == 512 - len(text.end) and ids.shape == mask.shape == (1, 1, int(mask.sum()))


def test_image_latents_equal_those_of_the_pipeline(run: Any, pipeline: Any) -> None:
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae, codec = run.arch.load.vae(), run.arch.codec
    actual = codec.encode(vae, pixels, None)
    config = pipeline.vae.config
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
    expected = pipeline.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    torch.testing.assert_close(actual, (expected - mean) / std, **FLOAT32_DEEP)
    assert actual.shape == (2, 16, 8, 12)
    decoded = codec.decode(vae, codec.normalize(actual))
    theirs = pipeline.vae.decode(expected[:, :, None]).sample[:, :, 0]
    torch.testing.assert_close(decoded, theirs, **FLOAT32_DEEP)
