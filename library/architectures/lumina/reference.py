"""Comparison of Lumina Image 2.0's denoiser with diffusers' class on the same weights."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.lumina.layers import KEYS
from library.architectures.lumina.model import PATCH, LuminaConfig, NextDiT
from library.models.next_dit import COUNT_FIELDS
from library.models.reference import build_theirs, random_inputs, shorten_model, split_weights


def outputs(denoiser: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    assert isinstance(denoiser, NextDiT)
    ours = shorten_model(denoiser, COUNT_FIELDS)
    inputs = random_inputs(generator, ours.config.in_features // PATCH**2, ours.config.text_width)
    return ours(*inputs), diffusers_model(ours)(*inputs, return_dict=False)[0]


def diffusers_config(config: LuminaConfig) -> dict[str, Any]:
    # Its MLP is always four times as wide as the model, and its embedding of the noise level as wide up to 1024.
    return {
        "in_channels": config.in_features // PATCH**2,
        "hidden_size": config.width,
        "num_layers": config.num_layers,
        "num_refiner_layers": config.num_noise_refiners,
        "num_attention_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "multiple_of": 1,
        "axes_dim_rope": list(config.rope_axes),
        "cap_feat_dim": config.text_width,
    }


def diffusers_state(state: Mapping[str, Tensor], config: LuminaConfig) -> dict[str, Tensor]:
    kv_width = config.num_kv_heads * config.head_width
    return split_weights(state, KEYS.source_keys, [config.width, kv_width])


diffusers_model = partial(build_theirs, "Lumina2Transformer2DModel", diffusers_config, diffusers_state)
