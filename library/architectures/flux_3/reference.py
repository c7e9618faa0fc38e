"""Comparison of FLUX.3 Image Klein's denoiser with diffusers' class on the same weights."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.flux_3.model import NUM_AXES, Flux3
from library.models.loading import build_on_meta_device
from library.models.patches import patchify
from library.models.reference import SIDE, diffusers_class, random_inputs, shorten_model, with_weights


def outputs(denoiser: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Compare with the first block of each mode."""
    assert isinstance(denoiser, Flux3)
    few = build_on_meta_device(Flux3, replace(denoiser.config, num_mode=1))
    few.load_state_dict(denoiser.state_dict(), strict=False, assign=True)
    ours = shorten_model(few, {"single_blocks": "num_single"})
    inputs = random_inputs(generator, ours.config.in_features, ours.config.text_width)
    latents_BChw, sigmas_B, text_BLE, mask_BL = inputs
    zero, side = torch.zeros(1), torch.arange(SIDE) / 2.0
    expected_BTC: Tensor = diffusers_model(ours)(
        patchify(latents_BChw, 1),
        encoder_hidden_states=text_BLE,
        timestep=sigmas_B,
        img_ids=torch.cartesian_prod(zero, side, side, zero),
        txt_ids=torch.cartesian_prod(zero, zero, zero, torch.arange(text_BLE.shape[1]).float()),
        target_timestep=sigmas_B if ours.config.has_target else None,
        return_dict=False,
    )[0]
    return patchify(ours(latents_BChw, sigmas_B, text_BLE, torch.ones_like(mask_BL)), 1), expected_BTC


def diffusers_model(denoiser: Flux3) -> Any:
    """Build diffusers' model with the weights of `denoiser`; those for references that it lacks are 0."""
    from diffusers.loaders.single_file_utils import convert_flux3_transformer_checkpoint_to_diffusers

    c = denoiser.config
    # In the order of its arguments.
    sizes = (*[c.in_features] * 2, c.num_mode, c.num_single, c.head_width, c.width // c.head_width, c.text_width)
    more = {"mlp_ratio": c.mlp_width / c.width, "axes_dims_rope": [c.head_width // NUM_AXES] * NUM_AXES}
    model = diffusers_class("Flux3Transformer2DModel")(*sizes, **more, flow_map=c.has_target)
    state = {key: tensor.clone() for key, tensor in denoiser.state_dict().items()}
    lacking = {key: torch.zeros_like(tensor) for key, tensor in model.state_dict().items() if ".image_cond." in key}
    return with_weights(model, {**lacking, **convert_flux3_transformer_checkpoint_to_diffusers(state)})
