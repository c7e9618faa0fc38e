"""HunyuanImage 2.1 against diffusers' and transformers' models and pipeline with the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from hunyuan_image_train_network import setup_parser
from library.architectures.hunyuan_image.assembly import build, predict
from library.architectures.hunyuan_image.options import HunyuanImageOptions
from library.architectures.hunyuan_image.qwen import TEMPLATE
from library.architectures.hunyuan_image.reference import diffusers_model
from library.architectures.hunyuan_image.text import glyph_text
from library.architectures.hunyuan_image.vae import ChunkedConv2d, compute_in_chunks
from library.diffusion.guidance import apply_guidance
from library.diffusion.samplers import build_shifted_sampler
from library.protocols import Architecture
from library.training.evaluation.drawing import build_batch
from library.training.step.denoising import add_noise_at
from library.types import Prompt
from tests.tiny.hunyuan_image import (
    GLYPH_MASKS,
    VAE,
    build_tiny_hunyuan_image,
    inputs,
    oracle_output,
    tiny_hunyuan_image,
    tiny_parts,
    whole_qwen,
)
from tests.tolerances import FLOAT32_DEEP, FLOAT32_SAMPLED

SIZES = [(4, 4), (2, 7), (9, 3)]  # of the latent


@pytest.mark.parametrize("glyphs", list(GLYPH_MASKS))
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_and_input_gradients_match_diffusers(size: tuple[int, int], glyphs: str) -> None:
    """Gradients of text and glyphs agree too; masked tokens have none."""
    ours = tiny_hunyuan_image(1)
    theirs = diffusers_model(ours)
    results = []
    for run in (lambda values: ours(*values.values()), lambda values: oracle_output(theirs, values)):
        values = inputs(*size, glyphs)
        output = run(values)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        wanted = [values["latents"], values["text"], values["glyphs"]]
        results.append((output, *torch.autograd.grad((output * weights).sum(), wanted)))
    for ours_value, theirs_value in zip(*results, strict=True):
        torch.testing.assert_close(ours_value, theirs_value, **FLOAT32_DEEP)
    output, latents, text, glyph_gradient = results[0]
    assert min(output.abs().max(), latents.abs().max(), text.abs().max()) > 0.1
    masks = torch.tensor(GLYPH_MASKS[glyphs])
    assert bool((glyph_gradient.abs().sum(-1) > 0).eq(masks > 0).all())


def test_padding_does_not_affect_outputs() -> None:
    model = tiny_hunyuan_image(2)
    values = {name: value.detach() for name, value in inputs(4, 3).items()}
    output = model(*values.values())
    torch.testing.assert_close(
        model(*{**values, "text": values["text"] * values["text_mask"][..., None]}.values()), output, **FLOAT32_DEEP
    )
    short = {name: value[1:2] for name, value in values.items()} | {
        "text": values["text"][1:2, :4],
        "text_mask": values["text_mask"][1:2, :4],
        "glyphs": values["glyphs"][1:2, :0],
        "glyph_mask": values["glyph_mask"][1:2, :0],
    }
    torch.testing.assert_close(model(*short.values()), output[1:2], **FLOAT32_DEEP)


# HunyuanImage 2.1's text encoders, VAE and prompts against transformers' full models and diffusers' pipeline.

SEED = 5
CAPTIONS = ["a red cat", 'a blue dog with "words" on it, and \u201cmore words\u201d', ""]
QUOTED = ['a "b" c \u2018d e\u2019', "a \u201cb\u201d", "it isn't that it's quoted", "nothing"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny_hunyuan_image")


@pytest.fixture(scope="module")
def arch(folder: Path) -> Architecture:
    return build(HunyuanImageOptions.from_args(setup_parser().parse_args(build_tiny_hunyuan_image(folder, SEED))))


@pytest.fixture(scope="module")
def pipeline(arch: Architecture, folder: Path) -> Any:
    return pipeline_of(folder)


def pipeline_of(folder: Path) -> Any:
    """Return diffusers' pipeline with transformers' full text encoders and the weights of the folder."""
    from diffusers import AutoencoderKLHunyuanImage, FlowMatchEulerDiscreteScheduler, HunyuanImagePipeline
    from transformers import ByT5Tokenizer, Qwen2Tokenizer, T5Config, T5EncoderModel

    tokenizer = Qwen2Tokenizer.from_pretrained(str(folder / "tokenizer"))
    num_words = max(tokenizer.get_vocab().values()) + 1
    parts = tiny_parts(SEED, num_words)
    qwen = whole_qwen(num_words)
    prefix = "model.language_model."
    encoder_state = {
        name.removeprefix(prefix): t for name, t in parts["text_encoder"][1].items() if name.startswith(prefix)
    }
    qwen.load_state_dict(encoder_state, assign=True)
    byt5 = T5EncoderModel(T5Config(**parts["text_encoder_2"][0]))
    byt5.load_state_dict(
        {**parts["text_encoder_2"][1], "encoder.embed_tokens.weight": parts["text_encoder_2"][1]["shared.weight"]}
    )
    vae = AutoencoderKLHunyuanImage(**VAE)
    vae.load_state_dict(parts["vae"][1])
    return HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        vae=vae.eval(),
        text_encoder=qwen.eval(),
        tokenizer=tokenizer,
        text_encoder_2=byt5.eval(),
        tokenizer_2=ByT5Tokenizer(),
        transformer=diffusers_model(tiny_hunyuan_image(SEED)),
    )


def test_the_template_matches_diffusers(pipeline: Any) -> None:
    assert pipeline.prompt_template_encode == TEMPLATE
    assert pipeline.prompt_template_encode_start_idx == 34


@torch.no_grad()
def test_conditioning_matches_diffusers(arch: Architecture, pipeline: Any) -> None:
    """diffusers pads captions to 1000 tokens and runs all layers; only unpadded positions are compared."""
    ours = arch.text.encode(arch.load.text_encoders(), arch.text.tokenize(CAPTIONS))
    states, mask, glyphs, glyph_mask = pipeline.encode_prompt(CAPTIONS, batch_size=len(CAPTIONS))
    T = ours["vlm_mask"].shape[1]
    assert torch.equal(ours["vlm_mask"], mask[:, :T]) and not mask[:, T:].any()
    assert ours["vlm_mask"].sum(1).tolist() == [len(arch.text.qwen_tokenizer(c)["input_ids"]) + 1 for c in CAPTIONS]
    valid = ours["vlm_mask"].bool()
    torch.testing.assert_close(ours["vlm_embed"][valid], states[:, :T][valid], **FLOAT32_DEEP)
    assert torch.equal(ours["byt5_mask"], glyph_mask)
    torch.testing.assert_close(ours["byt5_embed"], glyphs, **FLOAT32_DEEP)
    assert ours["ocr_mask"].tolist() == [False, True, False]


@torch.no_grad()
def test_a_caption_does_not_depend_on_others_in_the_batch(arch: Architecture) -> None:
    encoders = arch.load.text_encoders()
    together = arch.text.encode(encoders, arch.text.tokenize(CAPTIONS))
    alone = arch.text.encode(encoders, arch.text.tokenize(CAPTIONS[:1]))
    T = alone["vlm_mask"].shape[1]
    torch.testing.assert_close(together["vlm_embed"][:1, :T], alone["vlm_embed"], **FLOAT32_DEEP)
    assert not together["vlm_mask"][0, T:].any()


def test_quoted_text_matches_diffusers_except_for_apostrophes() -> None:
    from diffusers.pipelines.hunyuan_image.pipeline_hunyuanimage import extract_glyph_text

    assert [glyph_text(caption) for caption in QUOTED] == ['Text "b". Text "d e". ', 'Text "b". ', None, None]
    for caption in (QUOTED[1], QUOTED[3], 'a "b" "c"'):
        assert glyph_text(caption) == extract_glyph_text(caption)
    assert extract_glyph_text(QUOTED[2]) == 'Text "t that it". '  # the behaviour that ours avoids


@torch.no_grad()
def test_the_original_vae_file_gives_the_latents_of_diffusers(arch: Architecture, pipeline: Any) -> None:
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = arch.codec.encode(arch.load.vae(), pixels, [torch.Generator().manual_seed(2)])
    expected = pipeline.vae.encode(pixels).latent_dist
    noise = torch.randn(expected.mean.shape[1:], generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(latents[0], expected.mean[0] + expected.std[0] * noise, **FLOAT32_DEEP)
    assert latents.shape == (1, 64, 2, 3)
    decoded = arch.codec.decode(arch.load.vae(), arch.codec.normalize(latents))
    torch.testing.assert_close(decoded, pipeline.vae.decode(latents).sample, **FLOAT32_DEEP)


@torch.no_grad()
def test_a_preview_matches_diffusers_pipeline(arch: Architecture, pipeline: Any) -> None:
    """Compare four steps of a wide image with plain classifier-free guidance, requested from diffusers' guider."""
    from diffusers.guiders import ClassifierFreeGuidance

    prompt = Prompt(CAPTIONS[1], "a cat", 128, 64, 1, 4, 3.5, None, None, None, None, 5.0)
    encoders = arch.load.text_encoders()
    positive, negative = (arch.text.encode(encoders, arch.text.tokenize([t])) for t in (prompt.text, prompt.negative))
    noise = torch.randn(1, 64, 2, 4, generator=torch.Generator().manual_seed(1))
    sampler, denoiser, latents = build_shifted_sampler(prompt), arch.load.denoiser(), noise
    for n, level in enumerate(sampler.levels):
        noised = add_noise_at(level, sampler.denoiser_input(latents, n))
        predicted = apply_guidance(
            lambda c, noised=noised: predict(denoiser, noised, c, build_batch(prompt)), positive, negative, prompt, 0.5
        )
        latents = sampler.step(predicted, latents, n, torch.Generator())
    pipeline.guider = ClassifierFreeGuidance(guidance_scale=prompt.scale)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt=prompt.text, negative_prompt=prompt.negative, width=128, height=64, num_inference_steps=4,
        latents=noise, output_type="latent",
    ).images  # fmt: skip
    assert (expected - noise).abs().max() > 0.1
    torch.testing.assert_close(latents, expected, **FLOAT32_SAMPLED)


def test_both_layouts_have_the_same_weights(arch: Architecture, tmp_path: Path) -> None:
    arguments = build_tiny_hunyuan_image(tmp_path, SEED, "diffusers")
    other = build(HunyuanImageOptions.from_args(setup_parser().parse_args(arguments)))
    for part in ("denoiser", "vae"):
        ours, theirs = (getattr(a.load, part)().state_dict() for a in (arch, other))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    for mine, yours in zip(arch.load.text_encoders(), other.load.text_encoders(), strict=True):
        ours, theirs = mine.state_dict(), yours.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_layers_and_the_last_norm_are_not_loaded(arch: Architecture) -> None:
    qwen = arch.load.text_encoders()[0]
    assert len(qwen.layers) == 2 and not list(qwen.norm.parameters())  # type: ignore[arg-type,union-attr]


@torch.no_grad()
@pytest.mark.parametrize("num_rows", [1, 5, 64])
def test_chunked_convolutions_give_the_same_latents_and_images(arch: Architecture, num_rows: int) -> None:
    pixels = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    unchunked, pieces = arch.load.vae(), compute_in_chunks(arch.load.vae(), num_rows)
    assert sum(isinstance(layer, ChunkedConv2d) for layer in pieces.modules()) > 20
    latents = [arch.codec.encode(vae, pixels, [torch.Generator().manual_seed(2)]) for vae in (unchunked, pieces)]
    torch.testing.assert_close(latents[1], latents[0], **FLOAT32_DEEP)
    images = [arch.codec.decode(vae, latents[0]) for vae in (unchunked, pieces)]
    torch.testing.assert_close(images[1], images[0], **FLOAT32_DEEP)
