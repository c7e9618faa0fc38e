"""A tiny but complete FLUX.1 model: the four files of the original release, or a diffusers folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.architectures.flux.keys import SWAPPED, source_keys, swap_halves
from library.architectures.flux.model import Flux, FluxConfig
from tests.tiny.init import fixed_init

FULL_SIZE = Path(__file__).parents[1] / "contracts" / "data"
CONFIG = FluxConfig(
    in_features=64,
    width=64,
    head_width=32,
    mlp_width=256,
    text_width=32,
    pooled_width=32,
    num_double=2,
    num_single=2,
    has_guidance=True,
)


def tiny_flux(seed: int, has_guidance: bool = True) -> Flux:
    """The denoiser alone, its weights random."""
    with torch.device("meta"):
        model = Flux(replace(CONFIG, has_guidance=has_guidance))
    model.load_state_dict(fixed_init(model, seed), assign=True)
    return model.requires_grad_(False).eval()


def diffusers_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the denoiser under diffusers' names."""
    found = {}
    for key, tensor in state.items():
        names = source_keys(key)
        tensor = swap_halves(tensor) if key.startswith(SWAPPED) else tensor
        width = tensor.shape[1] if tensor.ndim > 1 else CONFIG.width
        rows = [width, width, width, tensor.shape[0] - 3 * width][: len(names)]
        parts = torch.split(tensor, rows) if len(names) > 1 else (tensor,)
        found |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
    return found


def diffusers_config(config: FluxConfig = CONFIG) -> dict[str, Any]:
    """Arguments of diffusers' FluxTransformer2DModel, whose MLP is always four times as wide as the model."""
    return {
        "in_channels": config.in_features,
        "num_layers": config.num_double,
        "num_single_layers": config.num_single,
        "attention_head_dim": config.head_width,
        "num_attention_heads": config.width // config.head_width,
        "joint_attention_dim": config.text_width,
        "pooled_projection_dim": config.pooled_width,
        "guidance_embeds": config.has_guidance,
        "axes_dims_rope": list(config.rope_axes),
    }
