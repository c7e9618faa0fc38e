"""Stable Diffusion 3 against diffusers' SD3Transformer2DModel, pipeline and adapter loader with the same weights."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from library.architectures.sd3.assembly import build
from library.architectures.sd3.layers import view
from library.architectures.sd3.load import open_loader
from library.architectures.sd3.model import MMDiT, MMDiTConfig
from library.architectures.sd3.positions import nearest_side, scaled_positions, square_side, table_side
from library.types import Prompt
from networks.core.network.network import AdapterNetwork
from networks.lora_sd3 import create_network
from tests.hiding import lazily
from tests.parity.test_preview import ours
from tests.tiny.sd3 import (
    CONFIGS,
    DUAL,
    PLAIN,
    build_tiny_sd3,
    diffusers_mmdit,
    inputs,
    mmdit_weights,
    run_ours,
    run_theirs,
    tiny_mmdit,
)
from tests.tolerances import FLOAT32_DEEP, FLOAT32_SAMPLED
from tests.unit.architectures.test_sd3 import options_of
from tools.convert_lora import convert

SEED = 41
SIZES = ((16, 16), (24, 12), (10, 30))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_velocity_and_gradients_equal_diffusers(name: str, size: tuple[int, int]) -> None:
    config = CONFIGS[name]
    ours, theirs = tiny_mmdit(config, SEED), diffusers_mmdit(config, mmdit_weights(config, SEED))
    probe = torch.randn(2, config.in_channels, *size, generator=torch.Generator().manual_seed(5))
    gradients = []
    velocities = []
    for run, model in ((run_ours, ours), (run_theirs, theirs)):
        values = inputs(config, size, seed=6)
        velocities.append(run(model, values))
        wanted = [values[key] for key in ("latents", "context", "pooled")]
        gradients.append(torch.autograd.grad((velocities[-1] * probe).sum(), wanted))
    assert velocities[0].shape == (2, config.in_channels, *size)
    assert relative_error(velocities[0], velocities[1]) < 1e-4
    for actual, expected in zip(*gradients, strict=True):
        assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
def test_every_weight_affects_the_output(name: str) -> None:
    """A weight without effect would hide a wrong name."""
    config = CONFIGS[name]
    model = tiny_mmdit(config, SEED).requires_grad_()
    values = inputs(config, (16, 16), seed=6)
    run_ours(model, values).square().sum().backward()
    dead = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-7}
    # The text queries of the last block are unused.
    last = f"joint_blocks.{config.depth - 1}.context_block.attn.ln_q.weight"
    assert dead == ({last} if config.norms_queries else set())


def test_a_network_may_take_away_the_weight_of_the_first_layer() -> None:
    """LyCORIS' full weights replace both the weight and the forward of a layer."""
    model, values = tiny_mmdit(PLAIN, SEED), inputs(PLAIN, (8, 8), seed=6)
    expected = run_ours(model, values)
    layer = model.x_embedder.proj
    layer.forward = partial(conv2d, weight=layer.weight, bias=layer.bias, stride=layer.stride)
    del layer.weight
    assert torch.equal(run_ours(model, values), expected)


def test_an_image_may_use_any_crop_of_the_position_table() -> None:
    model = tiny_mmdit(DUAL, SEED)
    side = DUAL.positions_side
    numbered = torch.arange(side**2, dtype=torch.float32).view(1, -1, 1).expand(-1, -1, DUAL.width)
    model.pos_embed = numbered.contiguous()
    positions = model.positions(2, 3, (5, 7))[0, :, 0].tolist()
    assert positions == [5 * side + 7, 5 * side + 8, 5 * side + 9, 6 * side + 7, 6 * side + 8, 6 * side + 9]
    assert model.positions(2, 2, None)[0, 0, 0] == (side // 2 - 1) * side + side // 2 - 1


def test_an_image_larger_than_the_position_table_is_rejected() -> None:
    with pytest.raises(ValueError, match="an image of 784x64 pixels exceeds this model's limit of 384x384"):
        run_ours(tiny_mmdit(PLAIN, SEED), inputs(PLAIN, (8, 98), seed=6))


# Position embeddings scaled to the dataset's resolutions, against diffusers' table and in the model.

embeddings = lazily("diffusers.models.embeddings")


@pytest.mark.parametrize("side", [24, 32, 64])
def test_a_square_image_covers_sixteen_units_as_in_diffusers_table(side: int) -> None:
    expected = embeddings.get_2d_sincos_pos_embed(48, side, base_size=16, output_type="pt")
    actual = scaled_positions(side, side, side, None, 48)[0]
    # diffusers uses float32 coordinates.
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0.0, atol=2e-6)


def test_other_shapes_are_cropped_from_a_table_one_and_a_half_times_as_large() -> None:
    table = scaled_positions(36, 36, 24, (0, 0), 16).view(36, 36, 16)
    for h, w, corner in ((20, 28, None), (24, 24, None), (7, 36, (29, 0)), (10, 11, (3, 17))):
        top, left = ((36 - h) // 2, (36 - w) // 2) if corner is None else corner
        cut = table[top : top + h, left : left + w].reshape(1, h * w, 16)
        torch.testing.assert_close(scaled_positions(h, w, 24, corner, 16), cut, rtol=0.0, atol=0.0)


def test_an_image_uses_the_resolution_of_the_nearest_area() -> None:
    assert [square_side((512, 512), 2), square_side((1024, 1024), 2), square_side((640, 384), 2)] == [32, 64, 31]
    assert [nearest_side(*shape, [64, 32]) for shape in ((32, 32), (40, 26), (48, 53), (50, 52), (64, 64))] == [
        32, 32, 53, 64, 64
    ]  # fmt: skip
    assert nearest_side(10, 60, [32]) == 60  # longer than the 48 of the table
    assert table_side(31) == 46


def test_the_model_uses_scaled_positions_instead_of_its_table() -> None:
    model = tiny_mmdit(DUAL, 321)
    original = model.positions(6, 4, None)
    model.scaled_sides = (4, 6)
    actual: Tensor = model.positions(6, 4, None)
    assert actual.shape == original.shape
    assert not torch.equal(actual, original)
    assert torch.equal(actual, scaled_positions(6, 4, 4, None, model.config.width))
    assert model.table_side(6, 4) == 6


# SD3's previews against diffusers' StableDiffusion3Pipeline: the same weights, prompts and seed, text to latents.

NUM_TOKENS = 24


def pipeline_of(arch: Any, denoiser: Any, encoders: list[Any], folder: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTokenizer, T5TokenizerFast

    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    giant = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    giant.pad_token_id = 0  # OpenCLIP's padding, as in the pipeline's tokenizer_2
    pipeline = StableDiffusion3Pipeline(
        transformer=diffusers_mmdit(denoiser.config, denoiser.state_dict()),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=arch.load.vae(),
        text_encoder=encoders[0],
        tokenizer=clip,
        text_encoder_2=encoders[1],
        tokenizer_2=giant,
        text_encoder_3=encoders[2],
        tokenizer_3=T5TokenizerFast.from_pretrained(folder / "tokenizer_3"),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("scale", [1.0, 4.5])
@pytest.mark.parametrize("name", ["sd3-medium", "sd3.5-medium"])
def test_latents_equal_those_of_the_pipeline(tmp_path: Path, name: str, scale: float) -> None:
    assert name in CONFIGS
    arch = build(options_of(build_tiny_sd3(tmp_path, 9, name), t5xxl_max_token_length=NUM_TOKENS))
    denoiser, encoders = arch.load.denoiser(), arch.load.text_encoders()
    models = SimpleNamespace(denoiser=denoiser, text_encoders=encoders)
    run: Any = SimpleNamespace(arch=arch, models=models, device=torch.device("cpu"), autocast=nullcontext)
    prompt = Prompt(
        text="a red cat", negative="dog", width=64, height=96, seed=7, num_steps=4, scale=scale, sampler=None,
        guidance_scale=None, cfg_trunc_ratio=None, renorm_cfg=None, flow_shift=arch.preview.defaults.flow_shift,
    )  # fmt: skip
    expected = pipeline_of(arch, denoiser, encoders, tmp_path)(
        prompt.text, negative_prompt=prompt.negative, guidance_scale=scale, width=prompt.width, height=prompt.height,
        num_inference_steps=prompt.num_steps, generator=torch.Generator().manual_seed(7),
        max_sequence_length=NUM_TOKENS, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(ours(run, prompt), expected, **FLOAT32_SAMPLED)


# diffusers' SD3 pipeline loads every key of our converted files and computes the same as the adapter.

ARGUMENTS = {"default": {}, "embedders": {"emb_dims": "2,2,2,2,2,2"}, "split": {"split_qkv": "True"}}


def install_random_network(denoiser: MMDiT, encoders: list[Any], **args: str) -> AdapterNetwork:
    """Install a network of rank 3 and alpha 2 with random weights."""
    views = view(encoders, denoiser)
    network = create_network(1.0, 3, 2.0, None, *views, **args)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    network.apply_to(*views)
    return network


def adapter_inputs(config: MMDiTConfig) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(8)
    return {
        "latents": torch.randn(2, 16, 12, 8, generator=g),
        "timesteps": torch.tensor([31.0, 742.0]),
        "context": torch.randn(2, 7, config.context_width, generator=g),
        "pooled": torch.randn(2, config.pooled_width, generator=g),
        "ids": torch.randint(0, 90, (2, 77), generator=g),
    }


@torch.no_grad()
def answers(denoiser: Any, encoders: list[Any], values: dict[str, Tensor], is_ours: bool) -> list[Tensor]:
    if is_ours:
        velocity = denoiser(values["latents"], values["timesteps"], values["context"], values["pooled"])
    else:
        velocity = denoiser(
            hidden_states=values["latents"],
            timestep=values["timesteps"],
            encoder_hidden_states=values["context"],
            pooled_projections=values["pooled"],
        ).sample
    return [velocity, *(encoder(values["ids"]).text_embeds for encoder in encoders[:2])]


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_diffusers_predicts_the_same_with_our_file(tmp_path: Path, name: str, arguments: str) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from peft.tuners.tuners_utils import BaseTunerLayer

    loader, config = open_loader(options_of(build_tiny_sd3(tmp_path / "model", 31, name)))
    denoiser, encoders, values = loader.denoiser(), loader.text_encoders(), adapter_inputs(config)
    assert isinstance(denoiser, MMDiT)
    alone = answers(denoiser, encoders, values, is_ours=True)
    network = install_random_network(denoiser, encoders, **ARGUMENTS[arguments])
    ours = answers(denoiser, encoders, values, is_ours=True)
    assert all((a - b).abs().max() > 0.02 for a, b in zip(alone, ours, strict=True))
    network.save_weights(str(tmp_path / "ours.safetensors"), None, {})
    network.remove()
    convert(tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors", "diffusers", drop_unsupported=False)

    transformer = diffusers_mmdit(config, denoiser.state_dict())
    pipeline: Any = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=loader.vae(),
        text_encoder=encoders[0],
        tokenizer=None,
        text_encoder_2=encoders[1],
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
    counts = [
        sum(isinstance(module, BaseTunerLayer) for module in part.modules())
        for part in (transformer, encoders[0], encoders[1])
    ]
    num_fused = sum(path.endswith("qkv") for path, _ in denoiser.named_modules())
    assert sum(counts) == len(network.adapters) + 2 * num_fused, "each fused layer is three there"
    for actual, expected in zip(answers(transformer, encoders, values, is_ours=False), ours, strict=True):
        torch.testing.assert_close(actual, expected, **FLOAT32_DEEP)
