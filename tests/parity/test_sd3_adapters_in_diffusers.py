"""diffusers' SD3 pipeline loads every key of our converted files and computes the same as the adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.sd3.layers import view
from library.architectures.sd3.load import open_loader
from library.architectures.sd3.model import MMDiT, MMDiTConfig
from networks.core.network.network import AdapterNetwork
from networks.lora_sd3 import create_network
from tests.tiny.sd3 import CONFIGS, build_tiny_sd3, diffusers_mmdit
from tests.tolerances import FLOAT32_DEEP
from tests.unit.architectures.sd3.test_load import options_of
from tools.convert_lora import convert

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


def inputs(config: MMDiTConfig) -> dict[str, Tensor]:
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
    denoiser, encoders, values = loader.denoiser(), loader.text_encoders(), inputs(config)
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
