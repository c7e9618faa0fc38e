"""Keys and shapes of adapter files for Stable Diffusion 2.1 and XL, which other programs rely on, at full size."""

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from networks.core.protocol import adopt
from tests.contracts.full_size import facts, view_for_networks
from tests.contracts.saved_tensors import listed_shapes

pytestmark = pytest.mark.slow

Models = tuple[Any, nn.Module]
FACTS = {model: facts(f"lora_keys_{model}") for model in ("sd21", "sdxl")}
KINDS = [(model, kind) for model, found in FACTS.items() for kind in found if kind != "about"]
VARIANTS = [(model, kind, name) for model, kind in KINDS for name in FACTS[model][kind]["variants"]]
NUM_KEYS = {"sd21": 990, "sdxl": 2958}


@pytest.fixture(scope="module")
def models() -> dict[str, Models]:
    return {model: view_for_networks(model) for model in FACTS}


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
    is_dylora = kind == "networks.dylora"
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
    got = shapes_of(kind, models[model], variant["network_dim"], *sides, **variant["network_args"])
    assert listed_keys(model, kind, got) == listed_shapes(FACTS[model][kind], name)
    assert len(got) == variant.get("num_keys", len(got))


def test_sdxls_two_text_encoders_never_share_a_name(models: dict[str, Models]) -> None:
    keys = shapes_of("networks.dylora", models["sdxl"])
    prefixes = ("lora_te1_", "lora_te2_", "lora_te_")
    counts = {prefix: sum(key.startswith(prefix) for key in keys) // 3 for prefix in prefixes}
    assert counts == {"lora_te1_": 72, "lora_te2_": 192, "lora_te_": 0}


@pytest.mark.parametrize("kind", ["networks.lora", "networks.lora_fa"])
def test_a_list_of_25_blocks_is_an_error_that_asks_for_23(models: dict[str, Models], kind: str) -> None:
    with pytest.raises(ValueError, match="block_dims has 25 entries; this base model needs 23"):
        shapes_of(kind, models["sdxl"], block_dims=",".join(["4"] * 25))
