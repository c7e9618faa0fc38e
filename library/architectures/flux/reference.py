"""FLUX.1's and Chroma's denoiser beside diffusers' class with the same weights."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.flux.checkpoint_keys import source_keys
from library.architectures.flux.model import PATCH, Flux, FluxConfig
from library.checkpoints.fused_tensors import swap_halves
from library.models.double_stream_keys import SWAPPED
from library.models.patches import patchify
from library.models.reference import first_and_last

NUM_TEXT, SIDE = 24, 16  # text tokens; pixels of the latent


def outputs(denoiser: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the velocities of our class and of diffusers' for random inputs, float32, with the first and the last
    block of each kind."""
    assert isinstance(denoiser, Flux)
    state, counts = first_and_last(denoiser.state_dict(), ("double_blocks", "single_blocks"))
    config = replace(denoiser.config, num_double=counts[0], num_single=counts[1])
    with torch.device("meta"):
        ours = Flux(config)
    ours.load_state_dict(state, assign=True)
    latents_BCHW = torch.randn(2, config.in_features // PATCH**2, SIDE, SIDE, generator=generator)
    text_BLC = torch.randn(2, NUM_TEXT, config.text_width, generator=generator)
    pooled_BC = torch.randn(2, config.pooled_width, generator=generator) if config.pooled_width else None
    sigmas_B = torch.tensor([0.125, 0.875])
    # Chroma's class takes no guidance and assumes zero.
    guidance_B = torch.zeros(2) if config.approximator else torch.tensor([1.0, 3.5]) if config.has_guidance else None
    found_BTF = patchify(ours.eval()(latents_BCHW, sigmas_B, text_BLC, pooled_BC, guidance_B), PATCH)
    named = {} if config.approximator else {"pooled_projections": pooled_BC, "guidance": guidance_B}
    h = SIDE // PATCH
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(h), indexing="ij")
    theirs = diffusers_model(config)
    theirs.load_state_dict(diffusers_state(state, config.width))
    expected_BTF: Tensor = theirs.eval()(
        patchify(latents_BCHW, PATCH),
        encoder_hidden_states=text_BLC,
        timestep=sigmas_B,
        img_ids=torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float(),
        txt_ids=torch.zeros(NUM_TEXT, 3),
        **named,
    ).sample
    return found_BTF, expected_BTF


def diffusers_model(config: FluxConfig) -> Any:
    """Build diffusers' class, whose MLP is always four times as wide as the model."""
    from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel

    if config.approximator is None:
        return FluxTransformer2DModel(
            **sizes(config), pooled_projection_dim=config.pooled_width, guidance_embeds=config.has_guidance
        )
    parts = asdict(config.approximator)
    return ChromaTransformer2DModel(
        **sizes(config),
        approximator_num_channels=parts["in_features"],
        approximator_hidden_dim=parts["hidden_width"],
        approximator_layers=parts["depth"],
    )


def sizes(config: FluxConfig) -> dict[str, Any]:
    return {
        "in_channels": config.in_features,
        "num_layers": config.num_double,
        "num_single_layers": config.num_single,
        "attention_head_dim": config.head_width,
        "num_attention_heads": config.width // config.head_width,
        "joint_attention_dim": config.text_width,
        "axes_dims_rope": list(config.rope_axes),
    }


def diffusers_state(state: Mapping[str, Tensor], model_width: int) -> dict[str, Tensor]:
    """Return the weights under diffusers' names, stacked ones split."""
    found: dict[str, Tensor] = {}
    for key, tensor in state.items():
        names = source_keys(key)
        tensor = swap_halves(tensor) if key.startswith(SWAPPED) else tensor
        width = tensor.shape[1] if tensor.ndim > 1 else model_width
        rows = [width, width, width, tensor.shape[0] - 3 * width][: len(names)]
        parts = torch.split(tensor, rows) if len(names) > 1 else (tensor,)
        found |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
    return found
