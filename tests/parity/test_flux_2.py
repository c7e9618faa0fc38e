"""FLUX.2 against diffusers' Flux2Transformer2DModel and pipelines with the same weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pixel_shuffle

from library.architectures.flux_2.predict import predict, sampling_shift
from library.architectures.flux_2.reference import diffusers_model
from library.diffusion.references import reference_features
from library.models.vae.flux_2 import statistics
from library.types import Noised, Prompt
from tests.parity.test_preview import ours
from tests.parity.tiny_models import open_run
from tests.tiny.flux_2 import CONFIG, MISTRAL, build_tiny_flux_2, inputs, tiny_flux_2
from tests.tolerances import FLOAT32_DEEP, FLOAT32_SAMPLED

SIZES = [(8, 8), (3, 7), (9, 2)]  # of the latent, each of whose pixels is a token


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_reference_positions_and_attention_match_diffusers(size: tuple[int, int]) -> None:
    """Two references of other sizes follow the noisy tokens in `predict`, as in the pipeline of diffusers."""
    from diffusers import Flux2Pipeline as Pipeline

    ours = tiny_flux_2(6, True)
    theirs = diffusers_model(ours)
    g = torch.Generator().manual_seed(8)
    references = [torch.randn(2, CONFIG.in_features, *side, generator=g).requires_grad_() for side in ((4, 3), (2, 9))]

    def our_output(latents: Tensor, sigmas: Tensor, text: Tensor) -> Tensor:
        conditioning = {"hidden_state": text, **reference_features(references)}
        batch: Any = None
        return predict(ours, Noised(latents, latents, latents, sigmas, sigmas), conditioning, batch, guidance=4.0)

    def their_output(latents: Tensor, sigmas: Tensor, text: Tensor) -> Tensor:
        placed = Pipeline._prepare_image_ids([reference[:1] for reference in references]).expand(2, -1, -1)
        tokens = theirs(
            torch.cat([Pipeline._pack_latents(image) for image in (latents, *references)], dim=1),
            encoder_hidden_states=text,
            timestep=sigmas,
            img_ids=torch.cat([Pipeline._prepare_latent_ids(latents), placed], dim=1),
            txt_ids=Pipeline._prepare_text_ids(text),
            guidance=torch.full((2,), 4.0),
            return_dict=False,
        )[0]
        return tokens[:, : latents.shape[-2] * latents.shape[-1]].transpose(1, 2).reshape(latents.shape)  # type: ignore[no-any-return]

    results = []
    for run in (our_output, their_output):
        latents, sigmas, text, _ = inputs(*size)
        output = run(latents, sigmas, text)
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5))
        results.append((output, *torch.autograd.grad((output * weights).sum(), (latents, text, *references))))
    for ours_value, theirs_value in zip(*results, strict=True):
        assert theirs_value.abs().max() > 0.01
        torch.testing.assert_close(ours_value, theirs_value, **FLOAT32_DEEP)


def test_guidance_affects_only_dev() -> None:
    latents, sigmas, text, guidance = (value.detach() for value in inputs(4, 6))
    for is_dev in (False, True):
        model = tiny_flux_2(2, is_dev)
        is_same = torch.equal(model(latents, sigmas, text, guidance), model(latents, sigmas, text, 2 * guidance))
        assert is_same != is_dev


# FLUX.2 from text to latents and images against diffusers' pipelines: the same folder, prompts and seed.

PROMPT = Prompt(
    text="a red cat", negative="", width=64, height=96, seed=7, num_steps=5, scale=4.0, sampler=None,
    guidance_scale=None, cfg_trunc_ratio=None, renorm_cfg=None, flow_shift=None,
)  # fmt: skip
CAPTIONS = ["a red cat, sitting", "", "dog " * 600]


def run_of(folder: Path) -> Any:
    return open_run("flux_2", ["--pretrained_model_name_or_path", str(folder)])


def pipeline_of(folder: Path, is_dev: bool) -> Any:
    """Return the pipeline of a folder; dev's text encoder is the language part of a multimodal model."""
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Pipeline,
        Flux2Transformer2DModel,
    )
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer, Qwen3Model

    tokenizer = (PreTrainedTokenizerFast if is_dev else Qwen2Tokenizer).from_pretrained(folder / "tokenizer")
    pipeline = (Flux2Pipeline if is_dev else Flux2KleinPipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type="exponential", base_shift=0.5, max_shift=1.15
        ),
        vae=AutoencoderKLFlux2.from_pretrained(folder / "vae"),
        text_encoder=mistral3(folder) if is_dev else Qwen3Model.from_pretrained(folder / "text_encoder"),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel.from_pretrained(folder / "transformer"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def mistral3(folder: Path) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    state = load_file(folder / "text_encoder" / "model.safetensors")
    sight = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    words = {**MISTRAL, "model_type": "mistral", "vocab_size": len(state["embed_tokens.weight"])}
    config = Mistral3Config(text_config=words, vision_config={**sight, "num_attention_heads": 1, "head_dim": 8})
    model = Mistral3ForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(state)
    return model


@pytest.fixture(scope="module", params=[False, True], ids=["klein", "dev"])
def is_dev(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, is_dev: bool) -> Path:
    path = tmp_path_factory.mktemp("flux_2")
    build_tiny_flux_2(path, 9, "diffusers", is_dev)
    return path


@pytest.fixture(scope="module")
def run(folder: Path) -> Any:
    return run_of(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path, is_dev: bool) -> Any:
    return pipeline_of(folder, is_dev)


@pytest.mark.parametrize("changes", [{}, {"scale": 1.0, "num_steps": 4}], ids=["guided", "distilled"])
def test_latents_equal_those_of_the_pipeline(run: Any, pipeline: Any, is_dev: bool, changes: dict[str, Any]) -> None:
    prompt = replace(PROMPT, **changes)
    if is_dev:  # dev takes guidance as an input
        prompt = replace(prompt, guidance_scale=prompt.scale, scale=1.0)
    expected = pipeline(
        prompt=prompt.text, width=prompt.width, height=prompt.height, num_inference_steps=prompt.num_steps,
        guidance_scale=prompt.guidance_scale or prompt.scale, generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images  # fmt: skip
    actual = ours(run, prompt)
    if is_dev:  # dev returns the denoiser's latents as tokens
        actual = pipeline._pack_latents(actual)
    else:
        mean, deviation = statistics(run.arch.load.vae(), run.device)
        actual = pixel_shuffle(actual * deviation + mean, 2)
    torch.testing.assert_close(actual, expected, **FLOAT32_SAMPLED)


def test_every_prompt_setting_affects_the_image(run: Any, is_dev: bool) -> None:
    base = replace(PROMPT, guidance_scale=4.0, scale=1.0) if is_dev else PROMPT
    plain = ours(run, base)
    variants = ({"guidance_scale": 2.0},) if is_dev else ({"scale": 2.0}, {"negative": "a dog"})
    for changes in ({"text": "a dog"}, {"num_steps": 4}, *variants):
        assert not torch.allclose(ours(run, replace(base, **changes)), plain, rtol=1e-2), changes


@pytest.mark.parametrize("num_tokens", [256, 4096, 4300, 4301, 9000])
@pytest.mark.parametrize("num_steps", [4, 28, 50])
def test_noise_levels_are_shifted_as_in_the_pipeline(num_tokens: int, num_steps: int) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    expected = torch.tensor(compute_empirical_mu(num_tokens, num_steps)).exp()
    assert sampling_shift(num_tokens, num_steps) == pytest.approx(float(expected), rel=1e-6)


def test_caption_features_equal_those_of_the_pipeline(run: Any, pipeline: Any) -> None:
    """Features agree at all 512 positions, whatever else is in the batch."""
    text, encoders = run.arch.text, run.models.text_encoders
    actual = text.encode(encoders, text.tokenize(CAPTIONS))["hidden_state"]
    theirs = pipeline.encode_prompt(list(CAPTIONS), device=torch.device("cpu"))[0]
    assert actual.shape[1] == 512
    torch.testing.assert_close(actual, theirs, **FLOAT32_DEEP)
    alone = text.encode(encoders, text.tokenize(CAPTIONS[:1]))["hidden_state"]
    torch.testing.assert_close(alone, actual[:1], **FLOAT32_DEEP)


def test_unused_layers_are_not_loaded(run: Any, is_dev: bool) -> None:
    (encoder,) = run.models.text_encoders
    assert len(encoder.layers) == (30 if is_dev else 27)


def test_caption_tokens_are_counted_without_the_template(run: Any) -> None:
    text = run.arch.text
    count = text.count_tokens("a red cat")
    ids, mask = text.tokenize(["a red cat"]).ids_BLT
    assert int(mask.sum()) == count + 512 - text.max_tokens and ids.shape == (1, 1, 512)


def test_image_latents_equal_those_of_the_pipeline(run: Any, pipeline: Any) -> None:
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae, codec = run.arch.load.vae(), run.arch.codec
    actual = codec.encode(vae, pixels, [torch.Generator()] * 2)
    expected = pipeline._encode_vae_image(pixels, generator=torch.Generator())
    assert actual.shape == (2, 128, 4, 6) == (2, codec.spec.channels, 64 // 16, 96 // 16)
    torch.testing.assert_close(actual, expected, **FLOAT32_DEEP)
    decoded = codec.decode(vae, codec.normalize(actual))
    mean, deviation = statistics(vae, run.device)
    latents = pixel_shuffle(actual * deviation + mean, 2)
    torch.testing.assert_close(decoded, pipeline.vae.decode(latents).sample, **FLOAT32_DEEP)
