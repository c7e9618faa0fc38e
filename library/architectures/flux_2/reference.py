"""Comparison of FLUX.2's denoiser with diffusers' class on the same weights."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.flux_2.layers import KEYS
from library.architectures.flux_2.model import Flux2, Flux2Config
from library.models.patches import patchify
from library.models.reference import SIDE, build_theirs, random_inputs, shorten_model, split_stacked, stream_arguments

diffusers_state = partial(split_stacked, KEYS, 2)


def outputs(denoiser: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    assert isinstance(denoiser, Flux2)
    ours = shorten_model(denoiser, {"double_blocks": "num_double", "single_blocks": "num_single"})
    config = ours.config
    latents_BChw, sigmas_B, text_BLE, _ = random_inputs(generator, config.in_features, config.text_width)
    guidance_B = torch.tensor([1.0, 4.0]) if config.has_guidance else None
    zero = torch.arange(1)
    expected_BTC: Tensor = diffusers_model(ours)(
        patchify(latents_BChw, 1),
        encoder_hidden_states=text_BLE,
        timestep=sigmas_B,
        img_ids=torch.cartesian_prod(zero, torch.arange(SIDE), torch.arange(SIDE), zero),
        txt_ids=torch.cartesian_prod(zero, zero, zero, torch.arange(text_BLE.shape[1])),
        guidance=guidance_B,
        return_dict=False,
    )[0]
    return patchify(ours(latents_BChw, sigmas_B, text_BLE, guidance_B), 1), expected_BTC


def diffusers_config(config: Flux2Config) -> dict[str, Any]:
    return {
        **stream_arguments(config),
        "joint_attention_dim": config.text_width,
        "mlp_ratio": config.mlp_width / config.width,
        "guidance_embeds": config.has_guidance,
        "axes_dims_rope": list(config.rope_axes),
    }


diffusers_model = partial(build_theirs, "Flux2Transformer2DModel", diffusers_config, diffusers_state)
