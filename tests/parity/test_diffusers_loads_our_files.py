"""diffusers loads our files whole, in kohya's naming and its own, and computes what the adapter computes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from library.architectures.sd.view import view
from networks.core.network import AdapterNetwork
from networks.lora import create_network
from tests.tolerances import FLOAT32_DEEP
from tools.convert_lora import convert

MODULES = {"attention": {}, "attention and convolutions": {"conv_dim": "2", "conv_alpha": "1.5"}}


def load_pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None)


def trained(pipeline: Any, seed: int, **args: str) -> AdapterNetwork:
    """A network of rank 3 and alpha 2 with random weights, installed on the pipeline's models."""
    models = view([pipeline.text_encoder], pipeline.unet)
    network = create_network(1.0, 3, 2.0, None, *models, **args)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    network.apply_to(*models)
    return network


@torch.no_grad()
def predict(pipeline: Any, seed: int) -> Tensor:
    """The U-Net's answer to random latents and the text encoder's answer to random tokens."""
    generator = torch.Generator().manual_seed(seed)
    latents_BCHW = torch.randn(2, 4, 8, 8, generator=generator)
    ids_BT = torch.randint(0, 90, (2, 77), generator=generator)
    text_BTC = pipeline.text_encoder(ids_BT).last_hidden_state
    return pipeline.unet(latents_BCHW, torch.tensor([31, 742]), text_BTC).sample


def num_adapted(pipeline: Any) -> int:
    """How many modules diffusers has put a LoRA on."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    parts = (pipeline.unet, pipeline.text_encoder)
    return sum(isinstance(module, BaseTunerLayer) for part in parts for module in part.modules())


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", MODULES)
def test_prediction(tiny_sd_folder: Path, tmp_path: Path, naming: Any, kind: str) -> None:
    seed = 7000 + 10 * list(MODULES).index(kind) + len(naming)
    pipeline = load_pipeline(tiny_sd_folder)
    alone = predict(pipeline, seed)
    network = trained(pipeline, seed + 1, **MODULES[kind])
    ours = predict(pipeline, seed)
    assert (ours - alone).abs().max() > 0.05
    network.save_weights(str(tmp_path / "ours.safetensors"), None, {})
    network.remove()
    convert(tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors", naming, drop_unsupported=False)
    pipeline.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
    assert num_adapted(pipeline) == len(network.adapters)
    torch.testing.assert_close(predict(pipeline, seed), ours, **FLOAT32_DEEP)
