"""Comparison of Stable Diffusion 3's denoiser with diffusers' class on the same weights."""

import torch
from torch import Tensor, nn

from library.architectures.sd3.model import MMDiT
from library.models.reference import SIDE, diffusers_class, random_inputs, shorten_model, with_weights


def outputs(denoiser: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    assert isinstance(denoiser, MMDiT)
    last = denoiser.config.depth - 1
    new_indices = {0: 0, last: min(last, 1)}
    # The short copy numbers its blocks anew.
    dual = frozenset(new_indices[block] for block in denoiser.config.dual_attention if block in new_indices)
    ours = shorten_model(denoiser, {"joint_blocks": "depth"}, dual_attention=dual)
    config = ours.config
    latents_BCHW, _, context_BLC, _ = random_inputs(generator, config.in_channels, config.context_width)
    pooled_BC = torch.randn(2, config.pooled_width, generator=generator)
    timesteps_B = torch.tensor([37.0, 912.0])
    model = diffusers_class("SD3Transformer2DModel")(
        sample_size=SIDE,
        patch_size=config.patch,
        in_channels=config.in_channels,
        num_layers=config.depth,
        attention_head_dim=config.head_width,
        num_attention_heads=config.width // config.head_width,
        joint_attention_dim=config.context_width,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_width,
        out_channels=config.in_channels,
        pos_embed_max_size=config.positions_side,
        dual_attention_layers=tuple(config.dual_attention),
        qk_norm="rms_norm" if config.norms_queries else None,
    )
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in ours.state_dict().items()}
    theirs = with_weights(model, convert_sd3_transformer_checkpoint_to_diffusers(prefixed))
    found_BCHW: Tensor = ours(latents_BCHW, timesteps_B, context_BLC, pooled_BC)
    expected_BCHW: Tensor = theirs(
        hidden_states=latents_BCHW,
        timestep=timesteps_B,
        encoder_hidden_states=context_BLC,
        pooled_projections=pooled_BC,
    ).sample
    return found_BCHW, expected_BCHW
