"""FLUX.3 Image Klein from text to latents against diffusers' modular pipeline: the same folder, prompts and seed."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from library.architectures.flux_3.layers import KEYS
from library.architectures.flux_3.model import rope_at
from library.architectures.flux_3.predict import next_sigmas
from library.types import Prompt
from tests.parity.test_preview import ours
from tests.parity.tiny_models import open_run
from tests.tiny.flux_3 import build_tiny_flux_3, diffusers_state, tiny_flux_3
from tests.tolerances import FLOAT32_DEEP, FLOAT32_SAME_MATH, FLOAT32_SAMPLED

PROMPT = Prompt(
    text="a red cat", negative="a dog", width=64, height=96, seed=7, num_steps=5, scale=4.0, sampler=None,
    guidance_scale=None, cfg_trunc_ratio=None, renorm_cfg=None, flow_shift=6.93,
)  # fmt: skip
CAPTIONS = ["a red cat, sitting", "", "dog " * 100]
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


class Processor:
    """Qwen3-VL's processor, of which the pipeline uses the chat template and the tokenizer."""

    def __init__(self, folder: Path) -> None:
        from transformers import Qwen2Tokenizer

        self.tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer", padding_side="right")

    def apply_chat_template(self, messages: Any, **settings: Any) -> str:
        assert settings == {"tokenize": False, "add_generation_prompt": True}
        return CHAT.format(messages[0]["content"])


def folder_of(path: Path, is_distilled: bool) -> Path:
    build_tiny_flux_3(path, 9, "diffusers", is_distilled=is_distilled)
    return path


def run_of(folder: Path) -> Any:
    return open_run("flux_3", ["--pretrained_model_name_or_path", str(folder)])


def text_encoder(folder: Path) -> Any:
    from transformers import Qwen3VLModel

    return Qwen3VLModel.from_pretrained(folder / "text_encoder").eval()


@torch.no_grad()
def pipeline_latents(folder: Path, prompt: Prompt, is_distilled: bool) -> Any:
    from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler, Flux3Transformer2DModel
    from diffusers.modular_pipelines.flux3.modular_blocks_flux3 import Flux3CoreDenoiseStep, Flux3TextEncoderStep
    from diffusers.modular_pipelines.flux3.modular_blocks_flux3_distilled import (
        Flux3DistilledCoreDenoiseStep,
        Flux3DistilledTextEncoderStep,
    )
    from diffusers.modular_pipelines.modular_pipeline import SequentialPipelineBlocks

    steps = (
        (Flux3DistilledTextEncoderStep, Flux3DistilledCoreDenoiseStep)
        if is_distilled
        else (Flux3TextEncoderStep, Flux3CoreDenoiseStep)
    )
    blocks = SequentialPipelineBlocks.from_blocks_dict(dict(zip(("text_encoder", "denoise"), steps, strict=True)))
    pipeline: Any = blocks.init_pipeline()
    guidance = {} if is_distilled else {"guider": ClassifierFreeGuidance(guidance_scale=prompt.scale)}
    pipeline.update_components(
        text_encoder=text_encoder(folder),
        tokenizer=Processor(folder),
        transformer=Flux3Transformer2DModel.from_pretrained(folder / "transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.93),
        **guidance,
    )
    more = {} if is_distilled else {"negative_prompt": prompt.negative}
    return pipeline(
        prompt=prompt.text, width=prompt.width, height=prompt.height, num_inference_steps=prompt.num_steps,
        generator=torch.Generator().manual_seed(7), output="latents", **more,
    )  # fmt: skip


@pytest.mark.parametrize("is_distilled", [False, True], ids=["base", "distilled"])
@pytest.mark.parametrize("size", [(64, 96), (160, 32)], ids=str)
def test_latents_equal_those_of_the_pipeline(tmp_path: Path, is_distilled: bool, size: tuple[int, int]) -> None:
    """The base uses guidance; the distilled model none, and it is told the next level of each step."""
    folder, scale = folder_of(tmp_path, is_distilled), 1.0 if is_distilled else PROMPT.scale
    prompt = replace(PROMPT, width=size[0], height=size[1], scale=scale)
    expected = pipeline_latents(folder, prompt, is_distilled)
    actual = ours(run_of(folder), prompt)
    assert expected.abs().max() > 1
    torch.testing.assert_close(actual, expected, **FLOAT32_SAMPLED)


@pytest.mark.parametrize(("is_distilled", "steps", "scale"), [(False, 50, 3.5), (True, 16, 1.0)])
def test_previews_use_the_settings_of_the_variant(tmp_path: Path, is_distilled: bool, steps: int, scale: float) -> None:
    defaults = run_of(folder_of(tmp_path, is_distilled)).arch.preview.defaults
    assert (defaults.num_steps, defaults.scale, defaults.width, defaults.flow_shift) == (steps, scale, 1024, 6.93)


@torch.no_grad()
def test_caption_features_equal_those_of_the_pipeline_in_batches_too(tmp_path: Path) -> None:
    """Padding inside of a caption's window is part of them."""
    from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep

    folder = folder_of(tmp_path, False)
    run, encoder = run_of(folder), text_encoder(folder)
    text = run.arch.text
    features = text.encode(run.models.text_encoders, text.tokenize(CAPTIONS))
    windows = []
    for caption, states, mask in zip(CAPTIONS, features["hidden_state"], features["attention_mask"], strict=True):
        expected = Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds(encoder, Processor(folder), caption)[0]
        windows.append(len(expected))
        assert int(mask.sum()) == len(expected) and mask[: len(expected)].all()
        torch.testing.assert_close(states[: len(expected)], expected, **FLOAT32_DEEP)
        assert not states[len(expected) :].any()
    assert len(set(windows)) > 1 and all(length % 80 == 0 for length in windows)
    assert len(run.models.text_encoders[0].layers) == 32  # the last layer is not loaded


@torch.no_grad()
def test_a_batch_of_captions_with_windows_of_two_lengths_gives_the_velocities_of_each_alone() -> None:
    denoiser, generator = tiny_flux_3(3), torch.Generator().manual_seed(4)
    latents = torch.randn(2, 128, 4, 6, generator=generator)
    text = torch.randn(2, 12, denoiser.config.text_width, generator=generator)
    mask, sigmas = (torch.arange(12)[None] < torch.tensor([[12], [5]])).long(), torch.tensor([0.3, 0.9])
    together = denoiser(latents, sigmas, text, mask)
    for i, length in enumerate((12, 5)):
        rows = slice(i, i + 1)
        alone = denoiser(latents[rows], sigmas[rows], text[rows, :length], mask[rows, :length])
        torch.testing.assert_close(together[rows], alone, **FLOAT32_SAME_MATH)


def test_angles_equal_those_of_diffusers_at_the_positions_of_its_pipeline() -> None:
    from diffusers.models.transformers.transformer_flux3 import Flux3PosEmbed
    from diffusers.modular_pipelines.flux3.before_denoise import _prepare_image_ids

    sides, zero = [(3, 90), (4, 2), (5, 5)], torch.arange(1)
    images = [_prepare_image_ids(*side, 0.5, l_coord=-i) for i, side in enumerate(sides)]
    ids = torch.cat([torch.cartesian_prod(zero, zero, zero, torch.arange(400)), *images])
    cos, sin = Flux3PosEmbed(10_000, [32] * 4)(ids)
    angles = torch.stack([cos[:, ::2], sin[:, ::2]], dim=-1)
    torch.testing.assert_close(rope_at(400, sides, 128), angles, **FLOAT32_SAME_MATH)


@pytest.mark.parametrize("is_distilled", [False, True])
def test_keys_and_weights_return_from_diffusers_layout(is_distilled: bool) -> None:
    from library.checkpoints.weights import Weights

    state = tiny_flux_3(1, is_distilled).state_dict()
    theirs = diffusers_state(state)
    assert theirs.keys() == {name for key in state for name in KEYS.source_keys(key)}
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    back = KEYS.from_diffusers(Weights("theirs", shapes, lambda name: theirs[name]))
    assert back.shapes.keys() == state.keys()
    assert all(torch.equal(back.read(key), tensor) for key, tensor in state.items())
    assert not torch.equal(theirs["norm_out.linear.weight"], state["final_layer.image.adaLN_modulation.1.weight"])


def test_a_step_ends_at_the_next_level_of_the_sampler_and_the_last_at_0() -> None:
    levels: Any = [SimpleNamespace(sigma=sigma) for sigma in (1.0, 0.9, 0.5)]
    assert next_sigmas(torch.tensor([1.0, 0.9, 0.5, 0.7]), levels).tolist() == pytest.approx([0.9, 0.5, 0.0, 0.5])
