"""Comparison of Krea 2's denoiser with diffusers' class on the same weights."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.krea2.model import PATCH, Krea2Config, SingleStreamDiT
from library.models.patches import patchify
from library.models.reference import SIDE, build_theirs, random_inputs, shorten_model


def outputs(denoiser: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Compare with all blocks that fuse text."""
    assert isinstance(denoiser, SingleStreamDiT)
    ours = shorten_model(denoiser, {"blocks": "num_blocks"})
    c, theirs = ours.config, diffusers_model(ours)
    inputs = random_inputs(generator, c.in_features // PATCH**2, c.num_states * c.fusion.width)
    latents_BCHW, sigmas_B, text_BLF, mask_BL = inputs
    side = torch.arange(SIDE // PATCH)
    image_positions_T3 = torch.cartesian_prod(torch.arange(1), side, side)
    expected_BTF: Tensor = theirs(
        patchify(latents_BCHW, PATCH),
        encoder_hidden_states=text_BLF.unflatten(-1, (c.num_states, -1)),  # type: ignore[no-untyped-call]
        timestep=sigmas_B,
        position_ids=torch.cat([image_positions_T3.new_zeros(text_BLF.shape[1], 3), image_positions_T3]),
        encoder_attention_mask=mask_BL.bool(),
        return_dict=False,
    )[0]
    return patchify(ours(*inputs), PATCH), expected_BTF


def diffusers_config(c: Krea2Config) -> dict[str, Any]:
    return {
        "in_channels": c.in_features,
        "num_layers": c.num_blocks,
        "attention_head_dim": c.block.head_width,
        "num_attention_heads": c.block.width // c.block.head_width,
        "num_key_value_heads": c.block.num_kv_heads,
        "intermediate_size": c.block.mlp_width,
        "timestep_embed_dim": c.time_features,
        "text_hidden_dim": c.fusion.width,
        "num_text_layers": c.num_states,
        "text_num_attention_heads": c.fusion.width // c.fusion.head_width,
        "text_num_key_value_heads": c.fusion.num_kv_heads,
        "text_intermediate_size": c.fusion.mlp_width,
        "num_layerwise_text_blocks": c.num_layerwise,
        "num_refiner_text_blocks": c.num_refiners,
        "axes_dims_rope": list(c.rope_axes),
    }


def diffusers_state(state: Mapping[str, Tensor], config: Krea2Config) -> dict[str, Tensor]:
    """Return the weights under diffusers' names, converted by diffusers' own converter of single files."""
    from diffusers.loaders.single_file_utils import convert_krea2_transformer_checkpoint_to_diffusers

    return dict(convert_krea2_transformer_checkpoint_to_diffusers({k: tensor.clone() for k, tensor in state.items()}))


diffusers_model = partial(build_theirs, "Krea2Transformer2DModel", diffusers_config, diffusers_state)
