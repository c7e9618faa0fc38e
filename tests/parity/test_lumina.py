"""Lumina Image 2.0 against diffusers' Lumina2Transformer2DModel and pipeline with the same weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from library.types import Prompt
from tests.parity.test_preview import ours
from tests.parity.tiny_models import open_run
from tests.tiny.lumina import build_tiny_lumina, inputs, tiny_lumina
from tests.tolerances import FLOAT32_DEEP, FLOAT32_SAMPLED


def test_padding_does_not_affect_outputs() -> None:
    model = tiny_lumina(2)
    latents, times, text, mask = (value.detach() for value in inputs(8, 6, (5, 2)))
    expected = model(latents, times, text, mask)
    other = torch.where(mask.bool()[..., None], text, 100.0)
    torch.testing.assert_close(model(latents, times, other, mask), expected, **FLOAT32_DEEP)
    assert not torch.allclose(model(latents, times, text, torch.ones_like(mask)), expected, rtol=1e-2)


# Lumina Image 2.0 from text to latents against diffusers' Lumina2Pipeline: the same folder, prompts and seed.

NUM_TOKENS = 48
SYSTEM = "be a good dog"
PROMPT = Prompt(
    text="a red cat", negative="a dog", width=64, height=96, seed=7, num_steps=5, scale=4.0, sampler=None,
    guidance_scale=None, cfg_trunc_ratio=1.0, renorm_cfg=0.0, flow_shift=6.0,
)  # fmt: skip


def run_of(arguments: list[str], system_prompt: str = SYSTEM) -> Any:
    return open_run(
        "lumina", [*arguments, "--gemma2_max_token_length", str(NUM_TOKENS), "--system_prompt", system_prompt]
    )


def pipeline_of(folder: Path) -> Any:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
    from tokenizers.processors import TemplateProcessing
    from transformers import Gemma2Model, GemmaTokenizer

    tokenizer = GemmaTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    pipeline = Lumina2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=Gemma2Model.from_pretrained(folder / "text_encoder"),
        tokenizer=tokenizer,
        transformer=Lumina2Transformer2DModel.from_pretrained(folder / "transformer"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lumina")
    build_tiny_lumina(path, 9, "diffusers")
    return path


@pytest.mark.parametrize("changes", [{}, {"scale": 1.0}, {"cfg_trunc_ratio": 0.4}], ids=str)
def test_latents_equal_those_of_the_pipeline(folder: Path, changes: dict[str, float]) -> None:
    """diffusers limits the norm of guided predictions per row, ours per image, so the limit is off in both."""
    prompt = replace(PROMPT, **changes)
    expected = pipeline_of(folder)(
        prompt.text, negative_prompt=prompt.negative, width=prompt.width, height=prompt.height,
        num_inference_steps=prompt.num_steps, guidance_scale=prompt.scale, cfg_trunc_ratio=prompt.cfg_trunc_ratio,
        cfg_normalization=False, system_prompt=SYSTEM, generator=torch.Generator().manual_seed(7),
        max_sequence_length=NUM_TOKENS, output_type="latent",
    ).images  # fmt: skip
    actual = ours(run_of(["--pretrained_model_name_or_path", str(folder)]), prompt)
    torch.testing.assert_close(actual, expected, **FLOAT32_SAMPLED)


def test_every_prompt_setting_affects_the_image(folder: Path) -> None:
    run = run_of(["--pretrained_model_name_or_path", str(folder)])
    plain = ours(run, PROMPT)
    for changes in ({"cfg_trunc_ratio": 0.4}, {"renorm_cfg": 0.5}, {"flow_shift": 2.0}, {"negative": "a cat"}):
        assert not torch.allclose(ours(run, replace(PROMPT, **changes)), plain, rtol=1e-2), changes
    other = run_of(["--pretrained_model_name_or_path", str(folder)], "be a bad dog")
    assert not torch.allclose(ours(other, PROMPT), plain, rtol=1e-2)


def test_caption_features_equal_those_of_the_pipeline(folder: Path) -> None:
    """Only caption tokens are compared; padding is masked, and the pipeline computes it differently."""
    run = run_of(["--pretrained_model_name_or_path", str(folder)])
    captions = ["a red cat, sitting", "", "dog " * 40]
    actual = run.arch.text.encode(run.models.text_encoders, run.arch.text.tokenize(captions))
    texts = [f"{SYSTEM} <Prompt Start> {caption}" if caption else "" for caption in captions]
    states, mask = pipeline_of(folder)._get_gemma_prompt_embeds(texts, max_sequence_length=NUM_TOKENS)
    assert torch.equal(actual["attention_mask"], mask)
    assert mask.sum(1).tolist()[1:] == [1, NUM_TOKENS]
    is_caption = mask.bool()
    torch.testing.assert_close(actual["hidden_state"][is_caption], states[is_caption], **FLOAT32_DEEP)
