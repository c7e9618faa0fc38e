"""Names and shapes of full-size Anima files are a contract: the denoiser with its adapter, Qwen3 and the VAE."""

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from library.architectures.anima.keys import diffusers_key
from library.architectures.anima.model import Anima, read_config

FACTS: Mapping[str, Any] = json.loads(gzip.decompress((Path(__file__).parent / "data" / "anima.json.gz").read_bytes()))
COUNTS = {"dit": 685, "qwen3_0.6b": 310, "vae": 194, "vae_alternative_naming": 194}


def shapes_of(part: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in FACTS["components"][part].items()}


def anima_shapes(config_of: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = Anima(read_config(config_of))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_the_inventory_is_whole() -> None:
    assert {part: len(names) for part, names in FACTS["components"].items()} == COUNTS


def test_the_denoiser_has_the_names_and_shapes_of_the_file() -> None:
    expected = shapes_of("dit")
    assert anima_shapes(expected) == expected
    assert sum(torch.Size(shape).numel() for shape in expected.values()) == 2_091_068_928


def test_pruned_models_load() -> None:
    shapes = {
        name: shape
        for name, shape in shapes_of("dit").items()
        if not name.startswith("blocks") or int(name.split(".")[1]) < 5
    }
    assert anima_shapes(shapes) == shapes


def test_diffusers_has_every_weight_under_the_name_of_the_map() -> None:
    from diffusers import AnimaTextConditioner, CosmosTransformer3DModel

    with torch.device("meta"):
        models = {
            "transformer": CosmosTransformer3DModel(
                num_attention_heads=16, text_embed_dim=1024, extra_pos_embed_type=None
            ),
            "text_conditioner": AnimaTextConditioner(),
        }
    theirs = {
        f"{part}.{name}": tuple(tensor.shape)
        for part, model in models.items()
        for name, tensor in model.state_dict().items()
    }
    assert {diffusers_key(name): shape for name, shape in shapes_of("dit").items()} == theirs
