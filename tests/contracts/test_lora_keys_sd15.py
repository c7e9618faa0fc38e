"""Keys and shapes of Stable Diffusion 1.5 adapter files, which other programs rely on, at full size."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from library.architectures.sd.targets import view
from networks.core.protocol import adopt
from networks.lora import create_network, create_network_from_weights
from tests.contracts.full_size import facts
from tests.contracts.saved_tensors import listed_shapes

FACTS: Mapping[str, Any] = facts("lora_keys_sd15")


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    """Return full-size text encoder and U-Net as network modules see them, without weights."""
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        return view([CLIPTextModel(clip)], UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8))


def shapes_of(
    models: tuple[nn.Module, nn.Module], text: bool = True, unet: bool = True, **args: str
) -> dict[str, list[int]]:
    with torch.device("meta"):
        network = create_network(1.0, 4, 1, None, *models, **args)
    adopt(network).apply_to(*models, text, unet)
    network.remove()
    return {key: list(tensor.shape) for key, tensor in network.state_dict().items()}


def test_the_default_has_792_keys(models: tuple[nn.Module, nn.Module]) -> None:
    assert shapes_of(models) == FACTS["default"]
    assert len(FACTS["default"]) == 792


@pytest.mark.parametrize("name", FACTS["variants"])
def test_network_arguments_give_the_listed_keys_and_shapes(models: tuple[nn.Module, nn.Module], name: str) -> None:
    variant = FACTS["variants"][name]
    got = shapes_of(models, variant["train_text_encoder"], variant["train_unet"], **variant["network_args"])
    assert got == listed_shapes(FACTS, name)
    assert len(got) == variant["num_keys"]


def test_a_list_of_24_blocks_is_an_error_that_asks_for_25(models: tuple[nn.Module, nn.Module]) -> None:
    with pytest.raises(ValueError, match="block_dims has 24 entries; this base model needs 25"):
        shapes_of(models, block_dims=",".join(["4"] * 24))


def test_a_network_from_a_file_has_the_keys_of_the_file_regardless_of_earlier_networks(
    models: tuple[nn.Module, nn.Module],
) -> None:
    conv = FACTS["variants"]["conv_dim=8"]
    for shapes in ({**FACTS["default"], **conv["added"]}, FACTS["default"]):
        file = {
            key: torch.ones(()) if not shape else torch.empty(shape, device="meta") for key, shape in shapes.items()
        }
        with torch.device("meta"):
            network, _ = create_network_from_weights(1.0, "file", None, *models, file)
        assert {key: list(tensor.shape) for key, tensor in network.state_dict().items()} == shapes


def test_alpha_is_a_float32_scalar(models: tuple[nn.Module, nn.Module]) -> None:
    with torch.device("meta"):
        state = create_network(1.0, 4, 1, None, *models).state_dict()
    dtypes = {key.rpartition(".")[2]: tensor.dtype for key, tensor in state.items()}
    assert dtypes == {"alpha": torch.float32, "weight": torch.float32}
