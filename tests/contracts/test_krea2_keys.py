"""Names and shapes of full-size Krea 2 files, checked with the converters of diffusers."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from library.architectures.krea2.adapter_names import NAMES
from library.architectures.krea2.checkpoint_keys import KEYS, NUM_BLOCKS
from library.architectures.krea2.load import QWEN3_VL, read_denoiser
from library.architectures.krea2.model import SingleStreamDiT, read_config
from library.architectures.krea2.reference import diffusers_config
from library.architectures.krea2.text import LAYERS
from library.architectures.specs import list_specs
from library.checkpoints.base_files import BaseFiles
from library.models.adapter_views import view_denoiser
from library.models.identify import base_of_file
from library.models.language_models import with_first_layers
from library.models.loading import build_on_meta_device
from library.models.qwen3_vl import empty_qwen3_vl, qwen3_vl_component
from networks import dylora, lora_krea2
from networks.core.files.reading_writing import collect_saved_tensors
from tests.contracts.full_size import shapes_of_model, weights_of_shapes
from tests.recognising import base_of
from tests.tiny.krea2 import FULL_SIZE, full_size_qwen3_vl

NUM_PARAMETERS = 12_820_073_036
Shapes = Mapping[str, tuple[int, ...]]


@cache
def ours() -> SingleStreamDiT:
    return build_on_meta_device(SingleStreamDiT, FULL_SIZE)


@cache
def theirs() -> Any:
    from diffusers import Krea2Transformer2DModel

    with torch.device("meta"):
        return Krea2Transformer2DModel()


def test_our_names_load_into_the_diffusers_model() -> None:
    from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers

    state: dict[str, Tensor] = dict(ours().state_dict())
    assert sum(tensor.numel() for tensor in state.values()) == NUM_PARAMETERS
    converted = convert_krea2_transformer_checkpoint_to_diffusers(state)
    assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == shapes_of_model(theirs())


def test_our_sizes_match_the_defaults_of_diffusers() -> None:
    config = {**diffusers_config(FULL_SIZE), "axes_dims_rope": tuple(FULL_SIZE.rope_axes)}
    assert {name: theirs().config[name] for name in config} == config


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_denoiser_loads_from_the_names_of_either_layout(prefix: str) -> None:
    expected = shapes_of_model(ours())
    for shapes in (expected, shapes_of_model(theirs())):
        weights = read_denoiser(
            BaseFiles(Path("file"), weights_of_shapes({prefix + name: s for name, s in shapes.items()}))
        )
        assert dict(weights.shapes) == expected
        assert read_config(weights.shapes) == FULL_SIZE
        assert base_of_file(list_specs(), {prefix + name: s for name, s in shapes.items()}).name == "krea2"  # type: ignore[union-attr]


def test_the_used_text_encoder_layers_load() -> None:
    shapes = shapes_of_model(full_size_qwen3_vl())
    expected = {k: s for k, s in shapes.items() if not k.startswith("layers.35.")}
    names = {f"model.language_model.{name}": shape for name, shape in shapes.items()}
    weights = weights_of_shapes({**names, "model.visual.pos_embed.weight": (2304, 1024)})
    component = with_first_layers(qwen3_vl_component(weights, None, QWEN3_VL), LAYERS[-1], QWEN3_VL.flag)
    assert shapes_of_model(empty_qwen3_vl(component.config)) == expected
    assert component.config["hidden_size"] == FULL_SIZE.fusion.width and len(LAYERS) == FULL_SIZE.num_states
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 35}
    assert heads.items() <= component.config.items()


@pytest.mark.parametrize("network_module", [lora_krea2, dylora])
def test_every_module_of_a_saved_file_is_a_layer_that_diffusers_finds(network_module: Any) -> None:
    """All 264 Linear layers are adapted, as by the model's authors and musubi-tuner."""
    from diffusers.loaders.lora_pipeline import Krea2LoraLoaderMixin

    network = network_module.create_network(1.0, 4, 4, None, *view_denoiser([], ours()))
    assert all(NAMES.find(name).kohya == name for name in network.adapters)  # type: ignore[union-attr]
    saved = collect_saved_tensors(network.adapters, None, NAMES)
    shapes = {key: tuple(tensor.shape) for key, tensor in saved.items()}
    linear = {path: module for path, module in ours().named_modules() if isinstance(module, nn.Linear)}
    expected = {f"diffusion_model.{p}.lora_A.weight": (4, m.in_features) for p, m in linear.items()}
    expected |= {f"diffusion_model.{p}.lora_B.weight": (m.out_features, 4) for p, m in linear.items()}
    assert len(linear) == 264 and shapes == expected
    assert base_of(shapes) == "krea2"
    converted = Krea2LoraLoaderMixin.lora_state_dict({key: torch.empty(shape) for key, shape in shapes.items()})
    layers = {path: module for path, module in theirs().named_modules() if isinstance(module, nn.Linear)}
    actual = {key.removeprefix("transformer.").partition(".lora_")[0] for key in converted}
    assert actual == {name for path in linear for name in KEYS.sources(path)} == layers.keys()
    for key, tensor in converted.items():
        path, _, leaf = key.removeprefix("transformer.").partition(".lora_")
        layer = layers[path]
        assert tensor.shape[leaf == "A.weight"] == (layer.in_features if leaf == "A.weight" else layer.out_features)


def test_adapter_paths_match_the_layers() -> None:
    paths = [path for path, module in ours().named_modules() if isinstance(module, nn.Linear)]
    assert sorted(KEYS.linear_paths(NUM_BLOCKS)) == sorted(paths)


@pytest.mark.parametrize(
    ("stem", "width", "name"),
    [
        ("lora_unet_blocks_4_attn_wq", 6144, "krea2"),
        ("lora_unet_blocks_4_mlp_gate", 6144, "krea2"),
        ("diffusion_model.txtfusion.projector", 12, "krea2"),
        ("base_model.model.blocks.4.attn.gate", 6144, "krea2"),
        ("transformer.transformer_blocks.4.attn.to_gate", 6144, "krea2"),
        ("transformer.transformer_blocks.4.ff.down", 16384, "krea2"),
        ("lora_unet_blocks_4_mlp_layer1", 2048, "anima"),
        ("transformer.transformer_blocks.4.attn.add_q_proj", 6144, "flux_2"),
    ],
)
def test_files_are_distinguished_from_models_with_similar_names(stem: str, width: int, name: str) -> None:
    assert base_of({f"{stem}.lora_down.weight": (4, width), f"{stem}.lora_up.weight": (8, 4)}) == name


def test_a_file_with_diffusers_names_is_not_mistaken_for_a_model_of_equal_width() -> None:
    widths = {f"transformer.transformer_blocks.0.{layer}": 6144 for layer in ("attn.to_q", "attn.to_gate", "ff.up")}
    shapes = {f"{stem}.lora_A.weight": (4, width) for stem, width in widths.items()}
    assert base_of(shapes | {f"{stem}.lora_B.weight": (8, 4) for stem in widths}) == "krea2"
