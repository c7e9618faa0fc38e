"""Names and shapes of full-size Z-Image files, checked with the converters of diffusers."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.architectures.specs import list_specs
from library.architectures.zimage.adapter_names import NAMES
from library.architectures.zimage.checkpoint_keys import KEYS
from library.architectures.zimage.load import QWEN3, read_denoiser
from library.architectures.zimage.model import ZImage, read_config
from library.architectures.zimage.reference import diffusers_config
from library.checkpoints.base_files import BaseFiles
from library.models.adapter_views import view_denoiser
from library.models.identify import base_of_file
from library.models.loading import build_on_meta_device
from library.models.qwen3 import empty_qwen3, qwen3_component
from networks import dylora, lora_zimage
from networks.core.files.reading_writing import collect_saved_tensors
from tests.contracts.full_size import shapes_of_model, weights_of_shapes
from tests.recognising import base_of
from tests.tiny.zimage import FULL_SIZE, full_size_qwen3

NUM_PARAMETERS = 6_154_908_736
EVERYWHERE = {"embedder_dims": "[2,2,2]", "include_patterns": "['.*']"}

Shapes = Mapping[str, tuple[int, ...]]


@cache
def ours() -> ZImage:
    return build_on_meta_device(ZImage, FULL_SIZE)


@cache
def theirs() -> Any:
    from diffusers import ZImageTransformer2DModel

    with torch.device("meta"):
        return ZImageTransformer2DModel()


def test_our_names_load_into_the_diffusers_model() -> None:
    """The diffusers converter reads the original layout with fused weights and an unused norm."""
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

    assert sum(tensor.numel() for tensor in ours().state_dict().values()) == NUM_PARAMETERS
    state: dict[str, Tensor] = {f"model.diffusion_model.{name}": t for name, t in ours().state_dict().items()}
    state["norm_final.weight"] = torch.empty(3840, device="meta")
    converted = convert_z_image_transformer_checkpoint_to_diffusers(state)
    assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == shapes_of_model(theirs())
    assert {**theirs().config, **diffusers_config(FULL_SIZE)} == dict(theirs().config)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_denoiser_loads_from_the_names_of_either_layout(prefix: str) -> None:
    expected = shapes_of_model(ours())
    for shapes in (expected, shapes_of_model(theirs())):
        weights = read_denoiser(
            BaseFiles(Path("file"), weights_of_shapes({prefix + name: s for name, s in shapes.items()}))
        )
        assert dict(weights.shapes) == expected
        assert read_config(weights.shapes) == FULL_SIZE
        assert base_of_file(list_specs(), {prefix + name: s for name, s in shapes.items()}).name == "zimage"  # type: ignore[union-attr]


@pytest.mark.parametrize("prefix", QWEN3.prefixes)
def test_qwen3_4b_loads_with_every_prefix(prefix: str) -> None:
    expected = shapes_of_model(full_size_qwen3())
    component = qwen3_component(weights_of_shapes({prefix + name: shape for name, shape in expected.items()}), QWEN3)
    assert shapes_of_model(empty_qwen3(component.config)) == expected
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 36}
    assert heads.items() <= component.config.items()


def saved_shapes(network_module: Any, **arguments: str) -> dict[str, tuple[int, ...]]:
    network = network_module.create_network(1.0, 4, 4, None, *view_denoiser([], ours()), **arguments)
    for name in network.adapters:
        assert NAMES.find(name) is not None and NAMES.find(name).kohya == name  # type: ignore[union-attr]
    tensors = collect_saved_tensors(network.adapters, None, NAMES)
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


@pytest.mark.parametrize(("network_module", "arguments"), [(lora_zimage, {}), (lora_zimage, EVERYWHERE), (dylora, {})])
def test_every_module_of_a_saved_file_exists_in_diffusers(network_module: Any, arguments: dict[str, str]) -> None:
    shapes = saved_shapes(network_module, **arguments)
    linear = {path: module for path, module in theirs().named_modules() if isinstance(module, nn.Linear)}
    if not arguments:  # the defaults of musubi-tuner
        linear = {p: m for p, m in linear.items() if p.startswith("layers.") and "_modulation" not in p}
        assert len(linear) == 210
    else:
        linear = {path: module for path, module in linear.items() if not path.startswith("all_final_layer")}
    ranks = {path: 2 if "_embedder" in path else 4 for path in linear}
    expected = {f"diffusion_model.{p}.lora_A.weight": (ranks[p], m.in_features) for p, m in linear.items()}
    expected |= {f"diffusion_model.{p}.lora_B.weight": (m.out_features, ranks[p]) for p, m in linear.items()}
    assert shapes == expected
    assert base_of(shapes) == "zimage"


@pytest.mark.parametrize("path", ["layers.29.attention.qkv", "layers.0.feed_forward.w1", "layers.3.attention.out"])
def test_files_with_original_names_are_distinguished_from_lumina_by_width(path: str) -> None:
    for stem in (f"lora_unet_{path.replace('.', '_')}", f"diffusion_model.{path}"):
        for width, name in ((3840, "zimage"), (2304, "lumina")):
            assert base_of({f"{stem}.lora_down.weight": (4, width), f"{stem}.lora_up.weight": (8, 4)}) == name


def test_adapter_paths_match_the_layers() -> None:
    paths = [path for path, module in ours().named_modules() if isinstance(module, nn.Linear)]
    counts = {"context_refiner": 2, "noise_refiner": 2, "layers": 30}
    assert sorted(KEYS.linear_paths(counts)) == sorted(paths)
