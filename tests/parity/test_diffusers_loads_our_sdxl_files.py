"""diffusers loads every key of our SDXL and SD 2.x files and computes the same as the adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.sd.layers import view as sd_view
from library.architectures.sdxl.layers import build_view
from networks.lora import create_network
from tests.tiny.sdxl import UNET_LAYOUT
from tests.tolerances import FLOAT32_DEEP

MODULES = {"attention": {}, "attention and convolutions": {"conv_dim": "2", "conv_alpha": "1.5"}}


def randomise(network: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


@torch.no_grad()
def predict_sdxl(pipeline: Any) -> Tensor:
    text_BTW, _, pooled_BP, _ = pipeline.encode_prompt(["a red cat", "dog"], do_classifier_free_guidance=False)
    latents_BCHW = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    sizes_B6 = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * 2)
    added_conditions = {"text_embeds": pooled_BP, "time_ids": sizes_B6}
    return pipeline.unet(latents_BCHW, torch.tensor([31, 742]), text_BTW, added_cond_kwargs=added_conditions).sample


@torch.no_grad()
def predict_sd2(pipeline: Any) -> Tensor:
    text_BTW, _ = pipeline.encode_prompt(["a red cat", "dog"], torch.device("cpu"), 1, False)
    latents_BCHW = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    return pipeline.unet(latents_BCHW, torch.tensor([31, 742]), text_BTW).sample


def num_adapted(*parts: torch.nn.Module) -> int:
    """Return the number of modules on which diffusers has installed a LoRA."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return sum(isinstance(module, BaseTunerLayer) for part in parts for module in part.modules())


@pytest.mark.parametrize("kind", MODULES)
def test_diffusers_predicts_the_same_with_our_sdxl_file(tiny_sdxl_folder: Path, tmp_path: Path, kind: str) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipeline: Any = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_folder)
    alone = predict_sdxl(pipeline)
    models = build_view(UNET_LAYOUT)([pipeline.text_encoder, pipeline.text_encoder_2], pipeline.unet)
    network = create_network(1.0, 3, 2.0, None, *models, **MODULES[kind])
    randomise(network, 71)
    network.apply_to(*models)
    ours = predict_sdxl(pipeline)
    assert (ours - alone).abs().max() > 0.05
    network.save_weights(str(tmp_path / "ours.safetensors"), None, {})
    network.remove()
    torch.testing.assert_close(predict_sdxl(pipeline), alone, rtol=0, atol=0)
    pipeline.load_lora_weights(tmp_path, weight_name="ours.safetensors")
    assert num_adapted(pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2) == len(network.adapters)
    torch.testing.assert_close(predict_sdxl(pipeline), ours, **FLOAT32_DEEP)


def test_diffusers_predicts_the_same_with_our_sd2_file(tiny_sd2_folder: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline: Any = StableDiffusionPipeline.from_pretrained(
        tiny_sd2_folder, safety_checker=None, feature_extractor=None
    )
    alone = predict_sd2(pipeline)
    models = sd_view([pipeline.text_encoder], pipeline.unet)
    network = create_network(1.0, 3, 2.0, None, *models)
    randomise(network, 72)
    network.apply_to(*models)
    ours = predict_sd2(pipeline)
    assert (ours - alone).abs().max() > 0.05
    network.save_weights(str(tmp_path / "ours.safetensors"), None, {})
    network.remove()
    pipeline.load_lora_weights(tmp_path, weight_name="ours.safetensors")
    assert num_adapted(pipeline.unet, pipeline.text_encoder) == len(network.adapters)
    torch.testing.assert_close(predict_sd2(pipeline), ours, **FLOAT32_DEEP)
