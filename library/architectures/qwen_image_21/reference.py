"""Comparison of Qwen-Image 2.1's denoiser with diffusers' class on the same weights."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.qwen_image_21.layers import BLOCKS
from library.architectures.qwen_image_21.model import QwenImage21, QwenImage21Config
from library.models.patches import patchify
from library.models.reference import SIDE, build_theirs, random_inputs, shorten_model

SLOT_SIDE = 2  # a slot, a text token that `img_mask` marks, represents a square of this many image tokens a side


def outputs(denoiser: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Compare without reference images."""
    assert isinstance(denoiser, QwenImage21)
    ours = shorten_model(denoiser, {BLOCKS: "num_blocks"})
    c, theirs = ours.config, diffusers_model(ours)
    latents_BChw, sigmas_B, text_BLE, mask_BL = random_inputs(generator, c.in_features, c.text_width)
    expected = []
    # One sample at a time: in a batch diffusers places the image after the longest caption.
    for b, length in enumerate(mask_BL.sum(1).tolist()):
        num_slots = (SIDE // SLOT_SIDE) ** 2
        tokens_1TC = theirs(
            patchify(latents_BChw[b : b + 1], 1),
            encoder_hidden_states=text_BLE[b : b + 1, :length],
            timestep=sigmas_B[b : b + 1],
            img_shapes=[[(1, SIDE, SIDE)]],
            img_mask=(torch.arange(length + num_slots) >= length)[None],
            return_dict=False,
        )[0]
        expected.append(tokens_1TC[:, -(SIDE**2) :])
    return patchify(ours(latents_BChw, sigmas_B, text_BLE, mask_BL), 1), torch.cat(expected)


def diffusers_config(config: QwenImage21Config) -> dict[str, Any]:
    return {
        "in_channels": config.in_features,
        "out_channels": config.in_features,
        "num_layers": config.num_blocks,
        "attention_head_dim": config.head_width,
        "num_attention_heads": config.width // config.head_width,
        "context_in_dim": config.text_width,
        "mlp_ratio": config.mlp_width // config.width,
        "axes_dims_rope": list(config.rope_axes),
    }


def diffusers_state(state: Mapping[str, Tensor], config: QwenImage21Config) -> Mapping[str, Tensor]:
    return state


diffusers_model = partial(build_theirs, "QwenImage21Transformer2DModel", diffusers_config, diffusers_state)
