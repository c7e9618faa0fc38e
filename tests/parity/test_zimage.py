"""Z-Image against diffusers' ZImageTransformer2DModel and pipeline with the same weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from library.types import Prompt
from tests.parity.test_preview import ours
from tests.parity.tiny_models import open_run
from tests.tiny.zimage import build_tiny_zimage, inputs, tiny_zimage
from tests.tolerances import FLOAT32_DEEP, FLOAT32_SAMPLED


def test_learned_padding_tokens_extend_captions_and_images() -> None:
    """Both are attended to: changing either changes the outputs exactly where padding is used."""
    latents, times, text, mask = (value.detach() for value in inputs(4, 14, (5, 5)))
    model = tiny_zimage(2)
    expected, unfilled = model(latents, times, text, mask), model(*inputs(16, 16, (32, 32)))
    for token in (model.cap_pad_token, model.x_pad_token):
        original = token.clone()
        token.mul_(-1)
        assert not torch.allclose(model(latents, times, text, mask), expected, rtol=1e-2)
        torch.testing.assert_close(model(*inputs(16, 16, (32, 32))), unfilled, rtol=0, atol=0)
        token.copy_(original)


def test_masked_caption_padding_does_not_affect_outputs() -> None:
    model = tiny_zimage(2)
    latents, times, text, mask = (value.detach() for value in inputs(8, 6, (5, 40)))
    other = torch.where(mask.bool()[..., None], text, 100.0)
    expected = model(latents, times, text, mask)
    torch.testing.assert_close(model(latents, times, other, mask), expected, rtol=0, atol=0)


# Z-Image from text to latents against diffusers' ZImagePipeline: the same folder, prompts and seed.

PROMPT = Prompt(
    text="a red cat", negative="a dog", width=64, height=96, seed=7, num_steps=5, scale=5.0, sampler=None,
    guidance_scale=None, cfg_trunc_ratio=None, renorm_cfg=None, flow_shift=3.0,
)  # fmt: skip


def run_of(folder: Path) -> Any:
    return open_run("zimage", ["--pretrained_model_name_or_path", str(folder)])


def pipeline_of(folder: Path) -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen2Tokenizer, Qwen3Model

    pipeline = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=Qwen3Model.from_pretrained(folder / "text_encoder"),
        tokenizer=Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
        transformer=ZImageTransformer2DModel.from_pretrained(folder / "transformer"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("zimage")
    build_tiny_zimage(path, 9, "diffusers")
    return path


@pytest.mark.parametrize("changes", [{}, {"scale": 1.0, "num_steps": 8}], ids=["base", "turbo"])
def test_latents_equal_those_of_the_pipeline(folder: Path, changes: dict[str, Any]) -> None:
    """The guidance scale of diffusers counts from 0, ours from 1."""
    prompt = replace(PROMPT, **changes)
    expected = pipeline_of(folder)(
        prompt.text, negative_prompt=prompt.negative, width=prompt.width, height=prompt.height,
        num_inference_steps=prompt.num_steps, guidance_scale=prompt.scale - 1,
        generator=torch.Generator().manual_seed(7), output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(ours(run_of(folder), prompt), expected, **FLOAT32_SAMPLED)


def test_every_prompt_setting_affects_the_image(folder: Path) -> None:
    run = run_of(folder)
    plain = ours(run, PROMPT)
    for changes in ({"flow_shift": 2.0}, {"negative": "a cat"}, {"text": "a dog"}, {"scale": 2.0}):
        assert not torch.allclose(ours(run, replace(PROMPT, **changes)), plain, rtol=1e-2), changes


def test_caption_features_equal_those_of_the_pipeline(folder: Path) -> None:
    run = run_of(folder)
    captions = ["a red cat, sitting", "", "dog " * 600]
    actual = run.arch.text.encode(run.models.text_encoders, run.arch.text.tokenize(captions))
    theirs = pipeline_of(folder)._encode_prompt(list(captions), device=torch.device("cpu"))
    lengths = actual["attention_mask"].sum(1).tolist()
    assert lengths == [len(states) for states in theirs] and lengths[2] == 512
    for states, mask, expected in zip(actual["hidden_state"], actual["attention_mask"], theirs, strict=True):
        torch.testing.assert_close(states[mask.bool()], expected, **FLOAT32_DEEP)
        assert not states[~mask.bool()].any()


def test_caption_tokens_are_counted_without_the_template(folder: Path) -> None:
    text = run_of(folder).arch.text
    count = text.count_tokens("a red cat")
    assert int(text.tokenize(["a red cat"]).ids_BLT[1].sum()) == count + 512 - text.max_tokens
