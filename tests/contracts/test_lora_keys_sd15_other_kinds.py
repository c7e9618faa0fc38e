"""Stable Diffusion 1.5 files by networks.lora_fa and networks.dylora have the keys and shapes of plain LoRA."""

import importlib
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from library.architectures.sd.targets import view
from networks.core.protocol import adopt
from tests.contracts.full_size import facts
from tests.contracts.saved_tensors import listed_shapes

pytestmark = pytest.mark.slow

FACTS: Mapping[str, Any] = facts("lora_keys_sd15_other_kinds")
MODULES = ("networks.lora_fa", "networks.dylora")
VARIANTS = [(module, name) for module in MODULES for name in FACTS[module]["variants"]]


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """Return full-size text encoder and U-Net as network modules see them, without weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        return view([CLIPTextModel(clip)], UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8))


def shapes_of(
    module: str, models: tuple[nn.Module, nn.Module], rank: int, text: bool, unet: bool, **args: str
) -> dict[str, list[int]]:
    with torch.device("meta"):
        network = importlib.import_module(module).create_network(1.0, rank, 1, None, *models, **args)
    adopt(network).apply_to(*models, text, unet)
    network.remove()
    return {key: list(tensor.shape) for key, tensor in network.state_dict().items()}


@pytest.mark.parametrize("module", MODULES)
def test_the_default_has_the_792_keys_of_a_plain_lora(models: tuple[nn.Module, nn.Module], module: str) -> None:
    got = shapes_of(module, models, 4, True, True)
    assert got == FACTS[module]["default"] == shapes_of("networks.lora", models, 4, True, True)
    assert len(got) == 792


@pytest.mark.parametrize(("module", "name"), VARIANTS)
def test_network_arguments_give_the_listed_keys_and_shapes(
    models: tuple[nn.Module, nn.Module], module: str, name: str
) -> None:
    variant = FACTS[module]["variants"][name]
    sides = variant["train_text_encoder"], variant["train_unet"]
    got = shapes_of(module, models, variant["network_dim"], *sides, **variant["network_args"])
    assert got == listed_shapes(FACTS[module], name)
    assert len(got) == variant["num_keys"]


@pytest.mark.parametrize("module", MODULES)
def test_files_have_the_same_keys_whichever_factors_are_trained(
    models: tuple[nn.Module, nn.Module], module: str
) -> None:
    with torch.device("meta"):
        network = importlib.import_module(module).create_network(1.0, 4, 1, None, *models, conv_dim="4")
    leaves = {key.partition(".")[2] for key in network.state_dict()}
    assert leaves == {"alpha", "lora_down.weight", "lora_up.weight"}
    trained = {name.partition(".")[2] for name, _ in network.named_parameters()}
    assert trained == {"lora_up.weight"} | ({"lora_down.weight"} if module == "networks.dylora" else set())
