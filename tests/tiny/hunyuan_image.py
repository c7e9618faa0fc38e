"""A tiny HunyuanImage 2.1."""

from typing import Any

import torch
from torch import Tensor

from library.architectures.hunyuan_image.keys import SWAPPED, source_keys, swap_halves
from library.architectures.hunyuan_image.model import HunyuanImage, HunyuanImageConfig
from tests.tiny.init import fixed_init

CONFIG = HunyuanImageConfig(
    channels=64,
    width=64,
    head_width=32,
    mlp_width=256,
    text_width=48,
    glyph_width=32,
    glyph_mlp_width=2048,  # as diffusers has it for every size
    num_double=2,
    num_single=2,
    num_refiners=2,
    refiner_mlp_width=256,
)


def tiny_hunyuan_image(seed: int) -> HunyuanImage:
    """The denoiser alone, its weights random."""
    with torch.device("meta"):
        model = HunyuanImage(CONFIG)
    model.load_state_dict(fixed_init(model, seed), assign=True)
    return model.requires_grad_(False).eval()


def diffusers_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the denoiser under diffusers' names."""
    found = {}
    for key, tensor in state.items():
        names = source_keys(key)
        tensor = swap_halves(tensor) if key.startswith(SWAPPED) else tensor
        width = CONFIG.width
        rows = [width, width, width, tensor.shape[0] - 3 * width][: len(names)]
        parts = torch.split(tensor, rows) if len(names) > 1 else (tensor,)
        found |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
    return found


def diffusers_config(config: HunyuanImageConfig = CONFIG) -> dict[str, Any]:
    """Arguments of diffusers' HunyuanImageTransformer2DModel, whose MLPs are all four times as wide as the model."""
    return {
        "in_channels": config.channels,
        "out_channels": config.channels,
        "num_attention_heads": config.width // config.head_width,
        "attention_head_dim": config.head_width,
        "num_layers": config.num_double,
        "num_single_layers": config.num_single,
        "num_refiner_layers": config.num_refiners,
        "text_embed_dim": config.text_width,
        "text_embed_2_dim": config.glyph_width,
        "rope_axes_dim": [config.head_width // 2, config.head_width // 2],
        "guidance_embeds": False,
        "use_meanflow": False,
    }
