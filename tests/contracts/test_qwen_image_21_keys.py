"""Names and shapes of full-size Qwen-Image 2.1 files, checked with diffusers."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from library.architectures.qwen_image_21.adapter_names import NAMES, NUM_BLOCKS
from library.architectures.qwen_image_21.checkpoint_keys import linear_paths
from library.architectures.qwen_image_21.load import QWEN3_VL, read_denoiser
from library.architectures.qwen_image_21.model import QwenImage21, read_config
from library.architectures.qwen_image_21.reference import diffusers_config
from library.architectures.qwen_image_21.vae import empty_vae, vae_config
from library.architectures.specs import list_specs
from library.checkpoints.base_files import BaseFiles
from library.models.adapter_views import view_denoiser
from library.models.identify import base_of_file
from library.models.loading import build_on_meta_device
from library.models.qwen3_vl import empty_qwen3_vl, qwen3_vl_component
from library.models.qwen3_vl_vision import empty_vision, vision_component
from networks import dylora, lora_qwen_image_21
from networks.core.files.reading_writing import collect_saved_tensors
from tests.contracts.full_size import shapes_of_model, weights_of_shapes
from tests.recognising import base_of
from tests.tiers import first_is_fast
from tests.tiny.qwen_image_21 import FULL_SIZE, full_size_encoder, full_size_vae, with_fused_gates

EMBEDDERS = {"in_dims": "[2,2,2,2]"}
NUM_PARAMETERS, NUM_VAE_PARAMETERS = 7_115_124_736, 337_740_404


@cache
def ours() -> QwenImage21:
    return build_on_meta_device(QwenImage21, FULL_SIZE)


@cache
def theirs() -> Any:
    from diffusers import QwenImage21Transformer2DModel

    with torch.device("meta"):
        return QwenImage21Transformer2DModel()


def test_names_shapes_and_sizes_match_diffusers() -> None:
    assert shapes_of_model(ours()) == shapes_of_model(theirs())
    assert sum(tensor.numel() for tensor in ours().state_dict().values()) == NUM_PARAMETERS
    expected = {**diffusers_config(FULL_SIZE), "axes_dims_rope": tuple(FULL_SIZE.rope_axes)}
    assert {name: theirs().config[name] for name in expected} == expected


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("is_fused", [False, True])
def test_the_denoiser_loads_from_fused_and_split_gates(prefix: str, is_fused: bool) -> None:
    state = dict(ours().state_dict())
    shapes = {prefix + n: tuple(t.shape) for n, t in (with_fused_gates(state) if is_fused else state).items()}
    weights = read_denoiser(BaseFiles(Path("file"), weights_of_shapes(shapes)))
    assert dict(weights.shapes) == shapes_of_model(ours())
    assert read_config(weights.shapes) == FULL_SIZE
    assert base_of_file(list_specs(), shapes).name == "qwen_image_21"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("prefix", "level"),
    first_is_fast([("model.", "language_model."), ("", "language_model."), ("model.", ""), (QWEN3_VL.prefix, "")]),
)
def test_the_text_encoder_loads_with_its_vision_model(prefix: str, level: str) -> None:
    """ComfyUI's files omit one level of the language model's names."""
    names = shapes_of_model(full_size_encoder())
    shapes = {prefix + name.replace("language_model.", level): shape for name, shape in names.items()}
    language, vision = (
        qwen3_vl_component(weights_of_shapes(shapes), None, QWEN3_VL),
        vision_component(weights_of_shapes(shapes)),
    )
    assert vision is not None
    actual = {level + name: shape for name, shape in shapes_of_model(empty_qwen3_vl(language.config)).items()}
    actual |= {f"visual.{name}": shape for name, shape in shapes_of_model(empty_vision(vision.config)).items()}
    assert {prefix + name: shape for name, shape in actual.items()} == shapes
    sizes = {"depth": 27, "hidden_size": 1152, "num_heads": 16, "patch_size": 16, "out_hidden_size": 4096}
    assert sizes.items() <= vision.config.items()


def test_the_vae_sizes_are_inferred_from_a_file() -> None:
    vae = full_size_vae()
    assert sum(tensor.numel() for tensor in vae.state_dict().values()) == NUM_VAE_PARAMETERS
    config = vae_config(shapes_of_model(vae))
    assert {name: vae.config[name] for name in config} == config
    assert shapes_of_model(empty_vae(config)) == shapes_of_model(vae)


@pytest.mark.parametrize(
    ("network_module", "arguments"), [(lora_qwen_image_21, {}), (lora_qwen_image_21, EMBEDDERS), (dylora, {})]
)
def test_every_module_of_a_saved_file_is_a_layer_that_diffusers_finds(
    network_module: Any, arguments: dict[str, str]
) -> None:
    """Everything in the blocks except norms is adapted."""
    from diffusers.loaders.lora_pipeline import QwenImageLoraLoaderMixin

    network = network_module.create_network(1.0, 4, 4, None, *view_denoiser([], ours()), **arguments)
    for name in network.adapters:
        assert NAMES.find(name) is not None and NAMES.find(name).kohya == name  # type: ignore[union-attr]
    tensors = collect_saved_tensors(network.adapters, None, NAMES)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    linear = {path: module for path, module in ours().named_modules() if isinstance(module, nn.Linear)}
    outer = ("img_in", "time_text_embed", "txt_in", "modulation") if arguments else ()
    linear = {p: m for p, m in linear.items() if p.startswith(("transformer_blocks", *outer))}
    ranks = {path: 4 if path.startswith("transformer_blocks") else 2 for path in linear}
    expected = {f"transformer.{p}.lora_A.weight": (ranks[p], m.in_features) for p, m in linear.items()}
    expected |= {f"transformer.{p}.lora_B.weight": (m.out_features, ranks[p]) for p, m in linear.items()}
    assert shapes == expected
    assert base_of(shapes) == "qwen_image_21"
    converted = QwenImageLoraLoaderMixin.lora_state_dict({key: torch.empty(shape) for key, shape in shapes.items()})
    assert {key.removeprefix("transformer.").partition(".lora_")[0] for key in converted} == set(linear)


@pytest.mark.parametrize(
    ("stem", "width", "name"),
    [
        ("lora_unet_transformer_blocks_3_img_mlp_proj", 4096, "qwen_image_21"),
        ("lora_unet_transformer_blocks_3_img_mlp_out", 12288, "qwen_image_21"),
        ("diffusion_model.transformer_blocks.12.attn.to_q", 4096, "qwen_image_21"),
        ("transformer.transformer_blocks.31.attn.to_out.0", 4096, "qwen_image_21"),
        ("transformer.transformer_blocks.4.attn.to_q", 4096, "flux_2"),  # klein 9B; the metadata decides
        ("transformer.single_transformer_blocks.12.attn.to_out", 16384, "flux_2"),
    ],
)
def test_files_are_distinguished_from_a_model_of_the_same_width(stem: str, width: int, name: str) -> None:
    assert base_of({f"{stem}.lora_down.weight": (4, width), f"{stem}.lora_up.weight": (8, 4)}) == name


def test_adapter_paths_match_the_layers() -> None:
    paths = [path for path, module in ours().named_modules() if isinstance(module, nn.Linear)]
    assert sorted(linear_paths(NUM_BLOCKS)) == sorted(paths) and len(paths) == 232
