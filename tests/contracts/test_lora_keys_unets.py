"""Keys and shapes of adapter files of Stable Diffusion 1.5, 2.1 and XL, which other programs rely on, at full size."""

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from library.architectures.sd.layers import view
from library.base.errors import UserError
from networks import lora
from networks.core.protocol import adopt
from tests.contracts.full_size import facts, view_for_networks
from tests.contracts.saved_tensors import listed_shapes

pytestmark = pytest.mark.slow

Models = tuple[Any, nn.Module]
FACTS = {
    "sd15": {"networks.lora": facts("lora_keys_sd15"), **facts("lora_keys_sd15_other_kinds")},
    **{model: facts(f"lora_keys_{model}") for model in ("sd21", "sdxl")},
}
KINDS = [(model, kind) for model, found in FACTS.items() for kind in found if kind.startswith("networks.")]
VARIANTS = [(model, kind, name) for model, kind in KINDS for name in FACTS[model][kind]["variants"]]
NUM_KEYS = {"sd15": 792, "sd21": 990, "sdxl": 2958}


@pytest.fixture(scope="module")
def models() -> dict[str, Models]:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        sd15 = view([CLIPTextModel(clip)], UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8))
    return {"sd15": sd15, **{model: view_for_networks(model) for model in ("sd21", "sdxl")}}


def shapes_of(
    kind: str, models: Models, rank: int = 4, text: bool = True, unet: bool = True, **args: str
) -> dict[str, list[int]]:
    with torch.device("meta"):
        network = importlib.import_module(kind).create_network(1.0, rank, 1, None, *models, **args)
    adopt(network).apply_to(*models, text, unet)
    network.remove()
    return {key: list(tensor.shape) for key, tensor in network.state_dict().items()}


def listed_keys(model: str, kind: str, shapes: dict[str, list[int]]) -> dict[str, list[int]]:
    """Return the listed keys; only the U-Net's for DyLoRA, as sd-scripts gives both text encoders one name."""
    is_dylora = kind == "networks.dylora" and model != "sd15"
    return {key: shape for key, shape in shapes.items() if not is_dylora or key.startswith("lora_unet_")}


@pytest.mark.parametrize(("model", "kind"), KINDS)
def test_the_default_has_the_keys_of_a_plain_lora(models: dict[str, Models], model: str, kind: str) -> None:
    got = shapes_of(kind, models[model])
    assert listed_keys(model, kind, got) == FACTS[model][kind]["default"]
    assert got == FACTS[model]["networks.lora"]["default"]
    assert len(got) == NUM_KEYS[model]


@pytest.mark.parametrize(("model", "kind", "name"), VARIANTS)
def test_network_arguments_give_the_listed_keys_and_shapes(
    models: dict[str, Models], model: str, kind: str, name: str
) -> None:
    variant = FACTS[model][kind]["variants"][name]
    sides = variant["train_text_encoder"], variant["train_unet"]
    got = shapes_of(kind, models[model], variant.get("network_dim", 4), *sides, **variant["network_args"])
    assert listed_keys(model, kind, got) == listed_shapes(FACTS[model][kind], name)
    assert len(got) == variant.get("num_keys", len(got))


def test_sdxls_two_text_encoders_never_share_a_name(models: dict[str, Models]) -> None:
    keys = shapes_of("networks.dylora", models["sdxl"])
    prefixes = ("lora_te1_", "lora_te2_", "lora_te_")
    counts = {prefix: sum(key.startswith(prefix) for key in keys) // 3 for prefix in prefixes}
    assert counts == {"lora_te1_": 72, "lora_te2_": 192, "lora_te_": 0}


@pytest.mark.parametrize("kind", ["networks.lora", "networks.lora_fa"])
@pytest.mark.parametrize(("model", "given", "needed"), [("sd15", 24, 25), ("sdxl", 25, 23)])
def test_a_list_of_other_blocks_is_an_error_that_asks_for_theirs(
    models: dict[str, Models], kind: str, model: str, given: int, needed: int
) -> None:
    with pytest.raises(UserError, match=f"block_dims has {given} entries; this base model needs {needed}"):
        shapes_of(kind, models[model], block_dims=",".join(["4"] * given))


def test_a_network_from_a_file_has_the_keys_of_the_file_regardless_of_earlier_networks(
    models: dict[str, Models],
) -> None:
    listed = FACTS["sd15"]["networks.lora"]
    for shapes in ({**listed["default"], **listed["variants"]["conv_dim=8"]["added"]}, listed["default"]):
        file = {
            key: torch.ones(()) if not shape else torch.empty(shape, device="meta") for key, shape in shapes.items()
        }
        with torch.device("meta"):
            network, _ = lora.create_network_from_weights(1.0, "file", None, *models["sd15"], file)
        assert {key: list(tensor.shape) for key, tensor in network.state_dict().items()} == shapes
        assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("module", ["networks.lora_fa", "networks.dylora"])
def test_files_have_the_same_keys_whichever_factors_are_trained(models: dict[str, Models], module: str) -> None:
    with torch.device("meta"):
        network = importlib.import_module(module).create_network(1.0, 4, 1, None, *models["sd15"], conv_dim="4")
    leaves = {key.partition(".")[2] for key in network.state_dict()}
    assert leaves == {"alpha", "lora_down.weight", "lora_up.weight"}
    trained = {name.partition(".")[2] for name, _ in network.named_parameters()}
    assert trained == {"lora_up.weight"} | ({"lora_down.weight"} if module == "networks.dylora" else set())
