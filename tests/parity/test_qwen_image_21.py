"""Qwen-Image 2.1 against diffusers' QwenImage21Transformer2DModel and pipeline with the same weights."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from library.architectures.qwen_image_21.model import QwenImage21
from library.architectures.qwen_image_21.predict import predict
from library.architectures.qwen_image_21.reference import diffusers_model
from library.data.decoding.tensors import to_pixels
from library.diffusion.references import reference_features
from library.training.evaluation.drawing import draw_latents, encode_prompts, seed_generator
from library.training.failures.vae_memory import tile_vae
from library.training.step.conditioning import CaptionMemo
from library.training.step.context import Models, StepContext
from library.types import CaptionWithImages, Noised, Prompt
from tests.parity.test_preview import ours
from tests.parity.tiny_models import open_run
from tests.tiny.qwen_image_21 import (
    LENGTHS,
    PLACES,
    build_tiny_qwen_image_21,
    inputs,
    oracle_output,
    references,
    tiny_qwen_image_21,
)
from tests.tolerances import FLOAT32_DEEP, FLOAT32_SAMPLED

SIZES = [(8, 8), (2, 6), (10, 4)]  # of the latent, each of whose pixels is a token


def our_output(
    model: QwenImage21, latents: Tensor, sigmas: Tensor, text: Tensor, mask: Tensor, shown: Sequence[Tensor] = ()
) -> Tensor:
    conditioning = {
        "hidden_state": text,
        "attention_mask": mask,
        "image_places": torch.tensor([PLACES[: len(shown)]] * len(mask), dtype=torch.long),
        **reference_features(shown),
    }
    batch: Any = None
    return predict(model, Noised(latents, latents, latents, sigmas, sigmas), conditioning, batch)


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_and_input_gradients_match_diffusers(size: tuple[int, int], count: int) -> None:
    """The batch has captions of two lengths and references of other sizes at their positions."""
    ours = tiny_qwen_image_21(1)
    theirs, results = diffusers_model(ours), []
    for run, model in ((our_output, ours), (oracle_output, theirs)):
        latents, sigmas, text, mask = inputs(*size)
        shown = references(count)
        output = run(model, latents, sigmas, text, mask, shown)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        results.append((output, *torch.autograd.grad((output * weights).sum(), (latents, text, *shown))))
    for ours_value, theirs_value in zip(*results, strict=True):
        assert theirs_value.abs().max() > 0.01
        torch.testing.assert_close(ours_value, theirs_value, **FLOAT32_DEEP)


def test_clean_tokens_do_not_depend_on_the_noise_level() -> None:
    """Text and references are modulated at noise level 0 and never attend to the noisy image."""
    model, states = tiny_qwen_image_21(2), []
    latents, sigmas, text, mask = (value.detach() for value in inputs(4, 6))
    model.transformer_blocks[-1].register_forward_hook(lambda module, args, output: states.append(output))
    for scale in (1, 3):
        our_output(model, latents * scale, sigmas / scale, text, mask, references(1))
    num_clean = LENGTHS[0] + 8
    assert torch.equal(states[0][:, :num_clean], states[1][:, :num_clean])
    assert not torch.allclose(states[0][:, num_clean:], states[1][:, num_clean:])


def test_blocks_compile_without_graph_breaks() -> None:
    torch.compiler.reset()  # graphs compiled by other tests count toward the limit
    model = tiny_qwen_image_21(4)
    expected = our_output(model, *inputs(4, 6), references(2))
    for block in model.transformer_blocks:
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(our_output(model, *inputs(4, 6), references(2)), expected, **FLOAT32_DEEP)


# Qwen-Image 2.1 from text and images to latents against diffusers' pipeline: the same folder, prompts and seed.

PROMPT = Prompt(
    text="a red cat", negative="", width=64, height=96, seed=7, num_steps=5, scale=1.0, sampler=None,
    guidance_scale=None, cfg_trunc_ratio=None, renorm_cfg=None, flow_shift=0.0,
)  # fmt: skip
CAPTIONS = ["a red cat, sitting", "", "dog " * 30]
SYSTEM_TEMPLATE = (  # as Qwen3-VL formats a system message
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content[0].text + '<|im_end|>\n' }}"
    "{% endfor %}"
)
SHIFTS = {"base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256, "max_image_seq_len": 8192}


def run_of(folder: Path) -> Any:
    return open_run("qwen_image_21", ["--pretrained_model_name_or_path", str(folder)])


def pipeline_of(folder: Path) -> Any:
    """Return the pipeline of a folder with the published scheduler settings."""
    from diffusers import (
        AutoencoderKLQwenImage21,
        FlowMatchEulerDiscreteScheduler,
        QwenImage21Pipeline,
        QwenImage21Transformer2DModel,
    )
    from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration, Qwen3VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class Processor(Qwen3VLProcessor):
        """A processor without the check for a class that needs torchvision and only handles videos."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None: ...

    sizes = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    limits = {"shortest_edge": 32 * 32, "longest_edge": 1 << 24}
    processor = Processor(
        image_processor=Qwen2VLImageProcessorPil(**sizes, size=limits, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer=Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
        chat_template=SYSTEM_TEMPLATE,
    )
    pipeline = QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type="exponential", shift_terminal=0.02, **SHIFTS
        ),
        vae=AutoencoderKLQwenImage21.from_pretrained(folder / "vae"),
        text_encoder=Qwen3VLForConditionalGeneration.from_pretrained(folder / "text_encoder"),
        processor=processor,
        transformer=QwenImage21Transformer2DModel.from_pretrained(folder / "transformer"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen_image_21")
    build_tiny_qwen_image_21(path, 9, "diffusers")
    return path


@pytest.fixture(scope="module")
def run(folder: Path) -> Any:
    return run_of(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return pipeline_of(folder)


def rgba(width: int, height: int, seed: int) -> Image.Image:
    """Return a noise image with an alpha channel of all values."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(values)


def caption_with(text: str, images: list[Image.Image]) -> CaptionWithImages:
    return CaptionWithImages(text, "digest", lambda: tuple(to_pixels(np.array(image)) for image in images))


def encoded(run: Any, captions: list[str]) -> Any:
    text = run.arch.text
    return text.encode(run.models.text_encoders, text.tokenize(captions))


def test_caption_features_equal_those_of_the_pipeline(run: Any, pipeline: Any) -> None:
    """Features are the states before the last norm, without the system message; an empty caption becomes a space."""
    actual = encoded(run, CAPTIONS)
    theirs, mask, _ = pipeline.encode_prompt(list(CAPTIONS), device=torch.device("cpu"))
    assert torch.equal(actual["attention_mask"], mask) and actual["image_places"].shape == (3, 0)
    torch.testing.assert_close(actual["hidden_state"], theirs, **FLOAT32_DEEP)
    normed = pipeline.text_encoder.model.language_model.norm(theirs)
    assert not torch.allclose(normed, theirs, rtol=0.05)
    alone = encoded(run, CAPTIONS[:1])["hidden_state"]
    torch.testing.assert_close(alone, actual["hidden_state"][:1, : alone.shape[1]], **FLOAT32_DEEP)


@pytest.mark.parametrize("sizes", [[(64, 32)], [(32, 96), (64, 64)]], ids=str)
def test_features_of_captions_with_images_match_the_pipeline(
    run: Any, pipeline: Any, sizes: list[tuple[int, int]]
) -> None:
    """Transparent images are composited over white; image tokens are removed, their positions kept."""
    images = [rgba(*size, seed) for seed, size in enumerate(sizes)]
    theirs, _, slots = pipeline.encode_prompt(["a red cat"], image=images, device=torch.device("cpu"))
    actual = encoded(run, ["a red cat", caption_with("a red cat", images)])
    length = int(actual["attention_mask"][1].sum())
    torch.testing.assert_close(actual["hidden_state"][1, :length], theirs[0, ~slots[0]], **FLOAT32_DEEP)
    starts = [i for i in range(1, len(slots[0])) if slots[0][i] and not slots[0][i - 1]]
    assert actual["image_places"][1].tolist() == [int((~slots[0][:start]).sum()) for start in starts]
    assert actual["image_places"][0].tolist() == [-1] * len(sizes)
    other_features = encoded(run, [caption_with("a red cat", [rgba(*size, 9) for size in sizes])])["hidden_state"]
    assert not torch.allclose(other_features[0], theirs[0, ~slots[0]], rtol=1e-2)


def tokens(latents: Tensor) -> Tensor:
    return latents.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("changes", [{}, {"scale": 3.0, "negative": "a dog"}], ids=["plain", "guided"])
def test_latents_equal_those_of_the_pipeline(run: Any, pipeline: Any, changes: dict[str, Any]) -> None:
    prompt = replace(PROMPT, **changes)
    expected = pipeline(
        prompt=prompt.text, negative_prompt=prompt.negative or None, true_cfg_scale=prompt.scale, width=prompt.width,
        height=prompt.height, num_inference_steps=prompt.num_steps, generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(tokens(ours(run, prompt)), expected, **FLOAT32_SAMPLED)


def test_latents_with_references_match_the_pipeline(run: Any, pipeline: Any, tmp_path: Path) -> None:
    """Use two transparent references whose sizes need no resizing."""
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    images = [rgba(64, 64, 1), rgba(64, 64, 2)]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    prompt = replace(PROMPT, width=64, height=64, reference_paths=tuple(paths))
    expected = pipeline(
        image=images, prompt=prompt.text, num_inference_steps=prompt.num_steps, output_resolution=64,
        generator=torch.Generator().manual_seed(7), output_type="latent",
    ).images  # fmt: skip
    actual = draw_with_vae(run, prompt)
    torch.testing.assert_close(tokens(actual), expected, **FLOAT32_SAMPLED)
    assert not torch.allclose(
        actual, draw_with_vae(run, replace(prompt, reference_paths=tuple(paths[::-1]))), rtol=1e-2
    )


@torch.no_grad()
def draw_with_vae(run: Any, prompt: Prompt) -> Tensor:
    """Draw the latents of a prompt with references, as previews do."""
    nothing: Any = None
    context = StepContext(
        arch=run.arch,
        models=Models(run.models.denoiser, run.models.text_encoders, None, nothing),
        network=nothing,
        seed=0,
        device=run.device,
        autocast=nullcontext,
        trains_text_encoder=False,
        captions=CaptionMemo(nothing),
    )
    encoded = encode_prompts(run.arch, run.models.text_encoders, nullcontext, [prompt])
    latents = draw_latents(context, prompt, encoded, seed_generator(prompt, 0, 0), vae=run.arch.load.vae())
    assert latents is not None
    return latents


@pytest.mark.parametrize("side", [256, 1024, 2048])
@pytest.mark.parametrize("num_steps", [1, 8, 40])
def test_noise_levels_match_the_pipeline(run: Any, pipeline: Any, side: int, num_steps: int) -> None:
    from diffusers.pipelines.qwenimage21.pipeline_qwenimage21 import calculate_shift

    mu = calculate_shift((side // 16) ** 2, 256, 8192, 0.5, 0.9)
    with np.errstate(invalid="ignore"):  # for a single level
        pipeline.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_steps, num_steps).tolist(), mu=mu)
    sampler = run.arch.preview.sampler(replace(PROMPT, width=side, height=side, num_steps=num_steps))
    actual = torch.tensor([level.sigma for level in sampler.levels])
    if num_steps == 1:  # the scheduler divides its only level by zero
        assert actual.tolist() == [1.0]
    else:
        torch.testing.assert_close(actual, pipeline.scheduler.sigmas[:-1], rtol=1e-5, atol=1e-6)


def test_the_shift_of_a_prompt_overrides_the_shift_by_size(run: Any) -> None:
    levels = run.arch.preview.sampler(replace(PROMPT, num_steps=3, flow_shift=3.0)).levels
    sigmas = [1.0, 3 * (2 / 3) / (1 + 2 * (2 / 3)), 3 * (1 / 3) / (1 + 2 * (1 / 3))]
    expected = [1 - (1 - sigma) * 0.98 / (1 - sigmas[-1]) for sigma in sigmas]
    assert [level.sigma for level in levels] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("num_channels", [3, 4])
def test_image_latents_equal_those_of_the_pipeline(run: Any, pipeline: Any, num_channels: int) -> None:
    """An image without an alpha channel is opaque."""
    pixels = torch.rand(2, num_channels, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae, codec = run.arch.load.vae(), run.arch.codec
    actual = codec.encode(vae, pixels, [torch.Generator()] * 2)
    rgba_pixels = pixels if num_channels == 4 else torch.cat([pixels, torch.ones(2, 1, 64, 96)], dim=1)
    expected = pipeline._encode_vae_image(rgba_pixels[:, :, None], generator=torch.Generator())[:, :, 0]
    assert actual.shape == (2, 64, 4, 6) == (2, codec.spec.channels, 64 // 16, 96 // 16)
    torch.testing.assert_close(actual, expected, **FLOAT32_DEEP)
    decoded = codec.decode(vae, codec.normalize(actual))
    mean, deviation = (torch.tensor(v).view(1, 64, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    theirs = pipeline.vae.decode((actual * deviation + mean)[:, :, None]).sample[:, :, 0]
    assert decoded.shape == (2, 4, 64, 96)
    torch.testing.assert_close(decoded, theirs, **FLOAT32_DEEP)


def test_vae_tiling_matches_diffusers(run: Any, pipeline: Any) -> None:
    """The VAE falls back to tiles if GPU memory runs out."""
    pixels = torch.rand(1, 4, 320, 288, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae, codec = run.arch.load.vae(), run.arch.codec
    untiled = codec.encode(vae, pixels, None)
    with tile_vae(vae):
        tiled = codec.encode(vae, pixels, None)
        decoded = codec.decode(vae, tiled)
    assert tiled.shape == untiled.shape and decoded.shape == pixels.shape
    assert not torch.equal(tiled, untiled) and not vae.use_tiling
    with tile_vae(pipeline.vae):
        expected = pipeline._encode_vae_image(pixels[:, :, None], generator=torch.Generator())[:, :, 0]
    torch.testing.assert_close(tiled, expected, **FLOAT32_DEEP)


def test_caption_tokens_are_counted_without_the_template(run: Any) -> None:
    text = run.arch.text
    ids, mask = text.tokenize(["a red cat", "dog " * 4000]).ids_BLT
    num_system = len(text.ids("<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"))
    assert mask.sum(-1).flatten().tolist() == [
        text.count_tokens("a red cat") + num_system + 1024 - text.max_tokens,
        num_system + 1024,
    ]
    assert ids.shape == mask.shape
