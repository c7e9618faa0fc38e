"""Names and shapes of full-size Anima files are a contract: the denoiser with its adapter, Qwen3 and the VAE."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from library.architectures.anima.load import PREFIXES, QWEN3, read_denoiser
from library.architectures.anima.model import Anima, read_config
from library.architectures.anima.reference import diffusers_key
from library.models.qwen3 import empty_qwen3, qwen3_component
from library.models.vae.qwen_image import empty_vae, from_original, vae_component
from tests.contracts.full_size import facts, weights_of_shapes

FACTS: Mapping[str, Any] = facts("anima")


def shapes_of(part: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(shape) for name, shape in FACTS["components"][part].items()}


def anima_shapes(config_of: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = Anima(read_config(config_of))
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_denoiser_has_the_names_and_shapes_of_the_file(prefix: str) -> None:
    expected = shapes_of("dit")
    weights = read_denoiser(Path("file"), weights_of_shapes({prefix + name: shape for name, shape in expected.items()}))
    assert anima_shapes(weights.shapes) == expected == dict(weights.shapes)
    assert sum(torch.Size(shape).numel() for shape in expected.values()) == 2_091_068_928


def test_pruned_models_load() -> None:
    shapes = {
        name: shape
        for name, shape in shapes_of("dit").items()
        if not name.startswith("blocks") or int(name.split(".")[1]) < 5
    }
    assert anima_shapes(shapes) == shapes


def test_anima_with_40_blocks_loads() -> None:
    """Anima 2.9B has 40 blocks instead of 28."""
    shapes = shapes_of("dit")
    block = {name.removeprefix("blocks.0."): shape for name, shape in shapes.items() if name.startswith("blocks.0.")}
    shapes |= {f"blocks.{number}.{name}": shape for number in range(40) for name, shape in block.items()}
    assert anima_shapes(shapes) == shapes
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 2_921_547_264


def test_the_map_gives_every_weight_its_diffusers_name() -> None:
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


@pytest.mark.parametrize("prefix", QWEN3.prefixes)
@pytest.mark.parametrize("extra", [{}, {"lm_head.weight": (151936, 1024)}], ids=["bare", "with head"])
def test_qwen3_loads_with_every_prefix(prefix: str, extra: dict[str, tuple[int, ...]]) -> None:
    expected = shapes_of("qwen3_0.6b")
    names = {**{prefix + name: shape for name, shape in expected.items()}, **extra}
    component = qwen3_component(weights_of_shapes(names), QWEN3)
    model = empty_qwen3(component.config)
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert dict(component.weights.shapes) == expected
    assert sum(torch.Size(shape).numel() for shape in expected.values()) == 596_049_920
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 28}
    assert heads.items() <= component.config.items()


@pytest.mark.parametrize("part", ["vae", "vae_alternative_naming"])
def test_the_vae_loads_from_both_layouts(part: str) -> None:
    component = vae_component("Anima", weights_of_shapes(shapes_of(part)))
    assert component.config == {
        "base_dim": 96,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "input_channels": 3,
    }
    model = empty_vae(component.config)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == dict(component.weights.shapes)
    assert dict(component.weights.shapes) == shapes_of("vae_alternative_naming")


def test_vae_names_match_diffusers_names_of_the_wan_vae() -> None:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    for name in shapes_of("vae"):
        assert list(convert_wan_vae_to_diffusers({name: 0})) == [from_original(name, 3)]
