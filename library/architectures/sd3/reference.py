"""Stable Diffusion 3's denoiser beside diffusers' class with the same weights."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from library.architectures.sd3.model import MMDiT
from library.models.reference import first_and_last

NUM_TEXT, SIDE = 24, 16  # text tokens; pixels of the latent


def outputs(denoiser: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the velocities of our class and of diffusers' for random inputs, float32, with the first and the last
    block."""
    from diffusers import SD3Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    assert isinstance(denoiser, MMDiT)
    state, (depth,) = first_and_last(denoiser.state_dict(), ("joint_blocks",))
    last = denoiser.config.depth - 1
    kept = {0: 0, last: depth - 1}
    dual = frozenset(kept[block] for block in denoiser.config.dual_attention if block in kept)
    config = replace(denoiser.config, depth=depth, dual_attention=dual)
    with torch.device("meta"):
        ours = MMDiT(config)
    ours.load_state_dict(state, assign=True)
    latents_BCHW = torch.randn(2, config.in_channels, SIDE, SIDE, generator=generator)
    context_BLC = torch.randn(2, NUM_TEXT, config.context_width, generator=generator)
    pooled_BC = torch.randn(2, config.pooled_width, generator=generator)
    timesteps_B = torch.tensor([37.0, 912.0])
    theirs = SD3Transformer2DModel(
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
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    theirs.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(prefixed))
    found_BCHW: Tensor = ours.eval()(latents_BCHW, timesteps_B, context_BLC, pooled_BC)
    expected_BCHW: Tensor = theirs.eval()(
        hidden_states=latents_BCHW,
        timestep=timesteps_B,
        encoder_hidden_states=context_BLC,
        pooled_projections=pooled_BC,
    ).sample
    return found_BCHW, expected_BCHW
