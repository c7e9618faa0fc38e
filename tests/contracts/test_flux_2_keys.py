"""Names and shapes of full-size FLUX.2 files, checked with the converters of diffusers."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.architectures.flux_2.adapter_names import NAMES
from library.architectures.flux_2.checkpoint_keys import KEYS
from library.architectures.flux_2.load import read_denoiser
from library.architectures.flux_2.mistral import empty_mistral
from library.architectures.flux_2.model import Flux2, Flux2Config, read_config
from library.architectures.flux_2.reference import diffusers_config
from library.architectures.flux_2.releases import DEV, KLEIN_4B, KLEIN_9B, Release
from library.architectures.specs import list_specs
from library.checkpoints.base_files import BaseFiles
from library.models.adapter_views import view_denoiser
from library.models.identify import base_of_file
from library.models.loading import build_on_meta_device
from networks import dylora, lora_flux_2
from networks.core.files.reading_writing import collect_saved_tensors
from tests.contracts.full_size import shapes_of_model, weights_of_shapes
from tests.recognising import base_of
from tests.tiny import flux_2 as tiny
from tests.tiny.flux_2 import full_size_encoder

SIZES = {"klein 4B": tiny.KLEIN_4B, "klein 9B": tiny.KLEIN_9B, "dev": tiny.DEV}
NUM_PARAMETERS = {"klein 4B": 3_875_544_576, "klein 9B": 9_078_581_248, "dev": 32_223_281_152}
EMBEDDERS = {"in_dims": "[2,2,2,2,2,2,2]"}

Shapes = Mapping[str, tuple[int, ...]]


@cache
def ours(config: Flux2Config) -> Flux2:
    return build_on_meta_device(Flux2, config)


@cache
def theirs(config: Flux2Config) -> Any:
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        return Flux2Transformer2DModel(**diffusers_config(config))


@pytest.mark.parametrize("size", SIZES)
def test_our_names_load_into_the_diffusers_model(size: str) -> None:
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    state: dict[str, Tensor] = dict(ours(SIZES[size]).state_dict())
    assert sum(tensor.numel() for tensor in state.values()) == NUM_PARAMETERS[size]
    converted = convert_flux2_transformer_checkpoint_to_diffusers(state)
    assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == shapes_of_model(theirs(SIZES[size]))


def test_the_sizes_of_dev_are_the_defaults_of_diffusers() -> None:
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        config = Flux2Transformer2DModel().config
    ours = {**diffusers_config(tiny.DEV), "axes_dims_rope": tuple(tiny.DEV.rope_axes)}
    assert {name: config[name] for name in ours} == ours


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("size", SIZES)
def test_the_denoiser_loads_from_the_names_of_either_layout(size: str, prefix: str) -> None:
    expected = shapes_of_model(ours(SIZES[size]))
    for shapes in (expected, shapes_of_model(theirs(SIZES[size]))):
        weights = read_denoiser(
            BaseFiles(Path("file"), weights_of_shapes({prefix + name: s for name, s in shapes.items()}))
        )
        assert dict(weights.shapes) == expected
        assert read_config(weights.shapes) == SIZES[size]
        assert base_of_file(list_specs(), {prefix + name: s for name, s in shapes.items()}).name == "flux_2"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("release", "prefix"),
    [(DEV, p) for p in ("", "model.", "language_model.model.", "model.language_model.", DEV.encoder.prefix)]
    + [(r, p) for r in (KLEIN_4B, KLEIN_9B) for p in ("", "model.", r.encoder.prefix)],
    ids=lambda value: value.name if isinstance(value, Release) else value,
)
def test_the_used_text_encoder_layers_load_with_every_prefix(release: Release, prefix: str) -> None:
    shapes = shapes_of_model(full_size_encoder(release.name))
    num_layers = release.encoder.layers[-1]
    expected = {k: s for k, s in shapes.items() if not k.startswith("layers.") or int(k.split(".")[1]) < num_layers}
    component = release.encoder.open(weights_of_shapes({prefix + name: shape for name, shape in shapes.items()}))
    assert shapes_of_model(release.encoder.empty(component.config)) == expected
    assert component.config["hidden_size"] * len(release.encoder.layers) == release.text_width
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": num_layers}
    assert heads.items() <= component.config.items()


def test_mistral_has_no_sliding_window() -> None:
    config = {**tiny.MISTRAL, "vocab_size": 8, "num_hidden_layers": 1}
    assert empty_mistral(config).config.sliding_window is None


def saved_shapes(network_module: Any, size: str, **arguments: str) -> dict[str, tuple[int, ...]]:
    network = network_module.create_network(1.0, 4, 4, None, *view_denoiser([], ours(SIZES[size])), **arguments)
    for name in network.adapters:
        assert NAMES.find(name) is not None and NAMES.find(name).kohya == name  # type: ignore[union-attr]
    tensors = collect_saved_tensors(network.adapters, None, NAMES)
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("network_module", "arguments"), [(lora_flux_2, {}), (lora_flux_2, EMBEDDERS), (dylora, {})])
def test_every_module_of_a_saved_file_is_a_layer_that_diffusers_finds(
    size: str, network_module: Any, arguments: dict[str, str]
) -> None:
    """Adapted modules are those of musubi-tuner: everything in the blocks except norms."""
    from diffusers.loaders.lora_pipeline import Flux2LoraLoaderMixin

    shapes = saved_shapes(network_module, size, **arguments)
    linear = {path: module for path, module in ours(SIZES[size]).named_modules() if isinstance(module, nn.Linear)}
    linear = {p: m for p, m in linear.items() if "_blocks." in p or (arguments and not p.startswith("final_layer"))}
    ranks = {path: 4 if "_blocks." in path else 2 for path in linear}
    expected = {f"diffusion_model.{p}.lora_A.weight": (ranks[p], m.in_features) for p, m in linear.items()}
    expected |= {f"diffusion_model.{p}.lora_B.weight": (m.out_features, ranks[p]) for p, m in linear.items()}
    assert shapes == expected
    assert base_of(shapes) == "flux_2"
    layers = {path: module for path, module in theirs(SIZES[size]).named_modules() if isinstance(module, nn.Linear)}
    converted = Flux2LoraLoaderMixin.lora_state_dict({key: torch.empty(shape) for key, shape in shapes.items()})
    actual = {key.removeprefix("transformer.").partition(".lora_")[0] for key in converted}
    assert actual == {name for path in linear for name in KEYS.sources(path)} <= layers.keys()
    for key, tensor in converted.items():
        path, _, leaf = key.removeprefix("transformer.").partition(".lora_")
        layer = layers[path]
        assert tensor.shape[leaf == "A.weight"] == (layer.in_features if leaf == "A.weight" else layer.out_features)


@pytest.mark.parametrize(
    ("stem", "width", "name"),
    [
        ("lora_unet_double_blocks_4_img_attn_qkv", 3072, "flux"),  # as wide as klein 4B; the metadata decides
        ("lora_unet_double_blocks_4_img_attn_qkv", 4096, "flux_2"),
        ("lora_unet_double_blocks_4_img_attn_qkv", 6144, "flux_2"),
        ("lora_unet_double_blocks_4_img_mlp_2", 12288, "flux"),
        ("lora_unet_double_blocks_4_img_mlp_2", 9216, "flux_2"),
        ("lora_unet_single_blocks_4_linear2", 15360, "flux"),
        ("lora_unet_single_blocks_4_linear2", 12288, "flux_2"),
        ("diffusion_model.single_blocks.4.linear2", 12288, "flux_2"),
        ("transformer.transformer_blocks.4.attn.to_q", 3072, "flux"),
        ("transformer.transformer_blocks.4.attn.to_q", 6144, "flux_2"),
        ("transformer.single_transformer_blocks.4.attn.to_out", 12288, "flux_2"),
    ],
)
def test_flux_1_and_flux_2_files_are_distinguished_by_width(stem: str, width: int, name: str) -> None:
    assert base_of({f"{stem}.lora_down.weight": (4, width), f"{stem}.lora_up.weight": (8, 4)}) == name


def test_adapter_paths_match_the_layers() -> None:
    paths = [path for path, module in ours(tiny.DEV).named_modules() if isinstance(module, nn.Linear)]
    assert sorted(KEYS.linear_paths({"double_blocks": 8, "single_blocks": 48})) == sorted(paths)
