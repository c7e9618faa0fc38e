"""Comparison of Z-Image's denoiser with diffusers' class on the same weights."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.zimage.layers import KEYS
from library.architectures.zimage.model import PATCH, ZImage, ZImageConfig
from library.models.next_dit import COUNT_FIELDS
from library.models.reference import LENGTHS, build_theirs, random_inputs, shorten_model, split_stacked

diffusers_state = partial(split_stacked, KEYS, 2)


def outputs(denoiser: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    assert isinstance(denoiser, ZImage)
    ours = shorten_model(denoiser, COUNT_FIELDS)
    inputs = random_inputs(generator, ours.config.in_features // PATCH**2, ours.config.text_width)
    latents_BCHW, times_B, text_BLE, _ = inputs
    captions = [states[:length] for states, length in zip(text_BLE, LENGTHS, strict=True)]
    frames = diffusers_model(ours)(list(latents_BCHW[:, :, None]), times_B, captions, return_dict=False)[0]
    return ours(*inputs), torch.stack(frames)[:, :, 0]


def diffusers_config(config: ZImageConfig) -> dict[str, Any]:
    # Its MLP is always 8/3 times as wide as the model.
    return {
        "in_channels": config.in_features // PATCH**2,
        "dim": config.width,
        "n_layers": config.num_layers,
        "n_refiner_layers": config.num_noise_refiners,
        "n_heads": config.num_heads,
        "n_kv_heads": config.num_kv_heads,
        "cap_feat_dim": config.text_width,
        "axes_dims": list(config.rope_axes),
    }


diffusers_model = partial(build_theirs, "ZImageTransformer2DModel", diffusers_config, diffusers_state)
