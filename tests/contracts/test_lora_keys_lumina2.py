"""Names and shapes of full-size Lumina Image 2.0 files, which other programs rely on: checkpoints and adapters."""

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.architectures.lumina.gemma import GEMMA_PREFIXES, empty_gemma, gemma_component
from library.architectures.lumina.layers import KEYS
from library.architectures.lumina.load import read_denoiser
from library.architectures.lumina.model import NextDiT, read_config
from library.checkpoints.base_files import BaseFiles
from library.models.adapter_views import view_both
from library.models.loading import build_on_meta_device
from networks.lora_lumina import create_network
from tests.contracts.full_size import facts, shapes_of_model, weights_of_shapes
from tests.contracts.saved_tensors import listed_shapes, saved_shapes

pytestmark = pytest.mark.slow

shapes_of = partial(saved_shapes, create_network)

FACTS: Mapping[str, Any] = facts("lumina2")
LORA = FACTS["lora"]
Models = tuple[nn.Module | list[nn.Module], nn.Module]


def part(name: str, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + key: tuple(shape) for key, shape in FACTS["components"][name].items()}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_denoiser_has_the_names_and_shapes_of_the_file(prefix: str) -> None:
    """Checkpoints have one more weight, which the reference model ignores too."""
    expected = part("dit")
    assert len(expected) == 400 and sum(torch.Size(shape).numel() for shape in expected.values()) == 2_609_771_456
    del expected["norm_final.weight"]
    weights = read_denoiser(BaseFiles(Path("file"), weights_of_shapes(part("dit", prefix))))
    assert (
        dict(weights.shapes) == expected == shapes_of_model(build_on_meta_device(NextDiT, read_config(weights.shapes)))
    )


def test_hyperparameters_are_inferred_from_shapes() -> None:
    config = read_config(part("dit"))
    assert (config.width, config.num_heads, config.num_kv_heads, config.head_width) == (2304, 24, 8, 96)
    assert (config.num_layers, config.num_noise_refiners, config.num_context_refiners) == (26, 2, 2)
    assert (config.mlp_width, config.time_width, config.text_width, config.rope_axes) == (9216, 1024, 2304, (32,) * 3)


def test_a_checkpoint_with_a_missing_part_raises_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match=r"cap_embedder\.1\.weight is missing; use a complete Lumina Image 2\.0"):
        read_config({key: shape for key, shape in part("dit").items() if "cap_embedder" not in key})
    with pytest.raises(ValueError, match=r"its layers are numbered \[0, 2, 3"):
        read_config({key: shape for key, shape in part("dit").items() if not key.startswith("layers.1.")})


def test_the_diffusers_layout_converts_to_our_shapes_and_names() -> None:
    from diffusers import Lumina2Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_lumina2_to_diffusers

    with torch.device("meta"):
        theirs = Lumina2Transformer2DModel(cap_feat_dim=2304)
    expected = part("dit")
    del expected["norm_final.weight"]
    assert dict(KEYS.from_diffusers(weights_of_shapes(shapes_of_model(theirs))).shapes) == expected
    for key, shape in expected.items():
        converted = list(convert_lumina2_to_diffusers({key: torch.empty(shape, device="meta")}))
        assert converted == list(KEYS.source_keys(key)), key


@pytest.mark.parametrize("prefix", GEMMA_PREFIXES)
def test_gemma_loads_with_every_prefix_and_ignores_other_tensors(prefix: str) -> None:
    unrelated = {"text_encoders.gemma2_2b.logit_scale": (), "spiece_model": (4,), "model.diffusion_model.x": (1,)}
    component = gemma_component(
        weights_of_shapes({**unrelated, **part("gemma2", prefix), "lm_head.weight": (256000, 2304)})
    )
    model = empty_gemma(component.config)
    assert shapes_of_model(model) == part("gemma2") == dict(component.weights.shapes)
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (8, 4, 256)
    assert (model.config.query_pre_attn_scalar, model.config.attn_logit_softcapping) == (256, 50.0)


@cache
def full_size_models() -> Models:
    """Return Gemma and the denoiser as network modules see them, without weights."""
    gemma = empty_gemma(gemma_component(weights_of_shapes(part("gemma2"))).config)
    return view_both([gemma], build_on_meta_device(NextDiT, read_config(part("dit"))))


@pytest.fixture(scope="module")
def models() -> Models:
    return full_size_models()


def ranks(shapes: Mapping[str, list[int]]) -> dict[str, int]:
    return {key.partition(".")[0]: shape[0] for key, shape in shapes.items() if key.endswith("lora_down.weight")}


def test_mlp_dim_applies_only_to_feed_forward_layers(models: Models) -> None:
    """In sd-scripts it applies only to the noise level embedder, which has its own rank option."""
    default = ranks(LORA["default"])
    expected = {name: 8 if "_feed_forward_" in name else rank for name, rank in default.items()}
    assert ranks(shapes_of(models, mlp_dim="8")) == expected
    embedders = ranks(listed_shapes(LORA, "embedder_dims=[5,6,7]"))
    assert ranks(shapes_of(models, mlp_dim="8", embedder_dims="[5,6,7]")) == {**embedders, **expected}


def test_refiner_dim_overrides_mlp_dim_and_yields_to_the_others(models: Models) -> None:
    name = "attn_dim=5 mlp_dim=6 mod_dim=7 refiner_dim=8"
    theirs = ranks(listed_shapes(LORA, name))
    expected = {
        key: 6 if "_layers_" in key and "_feed_forward_" in key and "lora_unet" in key else rank
        for key, rank in theirs.items()
    }
    assert ranks(shapes_of(models, **LORA["variants"][name]["network_args"])) == expected


def test_blocks_are_selected_by_index(models: Models) -> None:
    """sd-scripts ignores the argument. Refiners and the final layer are not numbered blocks."""
    got = shapes_of(models, train_block_indices="0,24-25")
    left_out = {f"lora_unet_layers_{n}" for n in range(1, 24)}
    expected = {
        key: s for key, s in LORA["default"].items() if not any(key.startswith(f"{stem}_") for stem in left_out)
    }
    assert got == expected
