"""Names and shapes of full-size Chroma files, of the model and of its adapters, are a contract."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from library.architectures.flux.approximator import ApproximatorConfig
from library.architectures.flux.layers import CHROMA_NAMES, KEYS, view_chroma
from library.architectures.flux.load import read_denoiser
from library.architectures.flux.model import Flux, FluxConfig, read_config
from library.checkpoints.base_files import BaseFiles
from library.models.loading import build_on_meta_device
from library.models.t5 import empty_t5
from networks.lora_flux import create_network
from tests.contracts.full_size import facts, weights_of_shapes
from tests.contracts.saved_tensors import saved_shapes
from tests.contracts.test_lora_keys_flux1 import T5_XXL

BASE: Mapping[str, tuple[int, ...]] = {
    name: tuple(shape) for name, shape in facts("chroma")["components"]["dit"].items()
}
LORA = facts("lora_keys_chroma")
FULL = FluxConfig(64, 3072, 128, 12288, 4096, 19, 38, True, 0, ApproximatorConfig(64, 5120, 5))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_denoiser_has_the_names_and_shapes_of_the_file(prefix: str) -> None:
    weights = read_denoiser(
        BaseFiles(Path("file"), weights_of_shapes({prefix + name: shape for name, shape in BASE.items()})), "chroma"
    )
    config = read_config(weights.shapes)
    assert config == FULL
    assert {
        name: tuple(tensor.shape) for name, tensor in build_on_meta_device(Flux, config).state_dict().items()
    } == BASE
    assert sum(torch.Size(shape).numel() for shape in BASE.values()) == 8_899_983_424


def test_the_diffusers_layout_converts_to_our_shapes() -> None:
    from diffusers import ChromaTransformer2DModel

    with torch.device("meta"):
        theirs = ChromaTransformer2DModel()
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert dict(KEYS.from_diffusers(weights_of_shapes(shapes)).shapes) == BASE


@cache
def full_size_models() -> tuple[list[nn.Module], nn.Module]:
    return view_chroma([empty_t5(T5_XXL)], build_on_meta_device(Flux, FULL))


@pytest.fixture(scope="module")
def models() -> tuple[list[nn.Module], nn.Module]:
    return full_size_models()


def test_the_approximator_is_adapted_only_on_request(models: tuple[list[nn.Module], nn.Module]) -> None:
    actual = saved_shapes(create_network, models, train_approximator="True")
    added = {key.split(".")[0] for key in actual.keys() - LORA["default"].keys()}
    stem = "lora_unet_distilled_guidance_layer"
    assert added == {f"{stem}_in_proj", f"{stem}_out_proj"} | {
        f"{stem}_layers_{n}_{side}_layer" for n in range(5) for side in ("in", "out")
    }
    assert actual[f"{stem}_layers_4_out_layer.lora_up.weight"] == [5120, 4]
    assert all(CHROMA_NAMES.find(name) is not None for name in added)


def test_adapter_names_and_checkpoint_layers_correspond() -> None:
    """Every adapter name belongs to a checkpoint layer, and every checkpoint layer has an adapter name."""
    adapter_names = {module.kohya for module in CHROMA_NAMES.modules if module.kohya.startswith("lora_unet")}
    layers = {name.removesuffix(".weight") for name in BASE if name.endswith(".weight")}
    assert adapter_names == {f"lora_unet_{layer.replace('.', '_')}" for layer in layers}
