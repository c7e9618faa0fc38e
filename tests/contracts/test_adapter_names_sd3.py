"""Adapter names of Stable Diffusion 3 against full-size checkpoints, known adapter files and diffusers' own reader."""

import pytest
import torch
from torch import Tensor

from library.architectures.sd3.layers import NAMES
from library.architectures.sd3.model import MMDiTConfig
from library.checkpoints.adapter_names import ModuleNames
from tests.tiny.sd3 import CONFIGS, full_size_keys, mmdit_weights

FACTS = full_size_keys()
BY_GENERIC = {module.generic: module for module in NAMES.modules}


@pytest.mark.parametrize("name", FACTS["mmdit"])
def test_every_layer_of_the_denoiser_has_a_name(name: str) -> None:
    layers = {key.removesuffix(".weight") for key, shape in FACTS["mmdit"][name].items() if key.endswith(".weight")}
    norms = {layer for layer in layers if layer.endswith((".ln_q", ".ln_k"))}
    assert {f"diffusion_model.{layer}" for layer in layers - norms} <= BY_GENERIC.keys()


def convert_to_diffusers(module: ModuleNames, weight: Tensor) -> dict[str, Tensor]:
    """Return the diffusers tensors of a fused weight."""
    if module.pieces:
        parts = weight.chunk(len(module.pieces))
        return {piece.diffusers: part for piece, part in zip(module.pieces, parts, strict=True)}
    assert isinstance(module.diffusers, str)
    is_pair = module.swaps_pair and weight.shape[0] == 2 * weight.shape[1]
    return {module.diffusers: weight.roll(weight.shape[0] // 2, 0) if is_pair else weight}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_layers_map_to_the_same_place_as_in_diffusers(config: MMDiTConfig) -> None:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    weights = mmdit_weights(config, 77)
    theirs = convert_sd3_transformer_checkpoint_to_diffusers(dict(weights))
    ours: dict[str, Tensor] = {}
    for key, weight in weights.items():
        stem = key.removesuffix(".weight")
        if f"diffusion_model.{stem}" in BY_GENERIC and key.endswith(".weight"):
            ours |= convert_to_diffusers(BY_GENERIC[f"diffusion_model.{stem}"], weight)
    expected = {
        f"transformer.{key.removesuffix('.weight')}": tensor
        for key, tensor in theirs.items()
        if key.endswith(".weight") and ".norm_" not in key.replace(".norm_out", "")
    }
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in ours)
