"""Comparison of FLUX.1's and Chroma's denoiser with diffusers' classes on the same weights."""

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.flux.layers import KEYS
from library.architectures.flux.model import PATCH, Flux, FluxConfig
from library.models.patches import patchify
from library.models.reference import SIDE, build_theirs, random_inputs, shorten_model, split_stacked, stream_arguments

diffusers_state = partial(split_stacked, KEYS, 3)


def outputs(denoiser: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    assert isinstance(denoiser, Flux)
    ours = shorten_model(denoiser, {"double_blocks": "num_double", "single_blocks": "num_single"})
    config = ours.config
    latents_BCHW, sigmas_B, text_BLC, _ = random_inputs(generator, config.in_features // PATCH**2, config.text_width)
    pooled_BC = torch.randn(2, config.pooled_width, generator=generator) if config.pooled_width else None
    # diffusers' class for Chroma takes no guidance and assumes zero.
    guidance_B = torch.zeros(2) if config.approximator else torch.tensor([1.0, 3.5]) if config.has_guidance else None
    # diffusers' class returns patches, ours whole latents.
    found_BTF = patchify(ours(latents_BCHW, sigmas_B, text_BLC, pooled_BC, guidance_B), PATCH)
    optional_inputs = {} if config.approximator else {"pooled_projections": pooled_BC, "guidance": guidance_B}
    h = SIDE // PATCH
    expected_BTF: Tensor = diffusers_model(ours)(
        patchify(latents_BCHW, PATCH),
        encoder_hidden_states=text_BLC,
        timestep=sigmas_B,
        img_ids=torch.cartesian_prod(torch.arange(1), torch.arange(h), torch.arange(h)).float(),
        txt_ids=torch.zeros(text_BLC.shape[1], 3),
        **optional_inputs,
    ).sample
    return found_BTF, expected_BTF


def diffusers_model(denoiser: Flux) -> Any:
    """Build diffusers' model with the weights of `denoiser`."""
    name = "FluxTransformer2DModel" if denoiser.config.approximator is None else "ChromaTransformer2DModel"
    return build_theirs(name, diffusers_config, diffusers_state, denoiser)


def diffusers_config(config: FluxConfig) -> dict[str, Any]:
    # Its MLP is always four times as wide as the model.
    axes = {"joint_attention_dim": config.text_width, "axes_dims_rope": list(config.rope_axes)}
    shared = {**stream_arguments(config), **axes}
    if config.approximator is None:
        return {**shared, "pooled_projection_dim": config.pooled_width, "guidance_embeds": config.has_guidance}
    approximator = asdict(config.approximator)
    return {
        **shared,
        "approximator_num_channels": approximator["in_features"],
        "approximator_hidden_dim": approximator["hidden_width"],
        "approximator_layers": approximator["depth"],
    }
