"""Configurations read off the shapes of weights, so that tiny and pruned models load from a single file.

`shapes` maps the module paths of diffusers and transformers to shapes, as `keys.py` gives them.
"""

import re
from collections.abc import Mapping
from math import gcd
from typing import Any

from library.architectures.sd.keys import UnetLayout

Shapes = Mapping[str, tuple[int, ...]]

NUM_HEADS = 8  # of every level of SD 1.x
CLIP_HEAD_WIDTH = 64
NORM_GROUPS = 32


def shape_of(shapes: Shapes, name: str) -> tuple[int, ...]:
    if name not in shapes:
        raise ValueError(f"{name} is not there; the checkpoint is incomplete or of another kind")
    return shapes[name]


def count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers the one group of `pattern` takes at the beginning of the names."""
    return len({match[1] for match in (re.match(pattern, name) for name in shapes) if match})


def norm_groups(*channels: int) -> int:
    """32, or for narrow models the largest divisor of 32 that divides every width."""
    return gcd(NORM_GROUPS, *channels)


def heads_of(width: int, wanted: int) -> int:
    """`wanted` heads, or the largest smaller number that divides `width`."""
    return next(heads for heads in range(max(wanted, 1), 0, -1) if width % heads == 0)


def unet_layout(ldm_shapes: Shapes) -> UnetLayout:
    """Layers per block and attention levels of a U-Net in the single-file layout, names without prefix."""
    num_blocks = count(ldm_shapes, r"input_blocks\.(\d+)\.")
    ends = [n for n in range(num_blocks) if f"input_blocks.{n}.0.op.weight" in ldm_shapes]
    per_level = ends[0] if ends else num_blocks
    if ends != [per_level * (level + 1) for level in range(len(ends))]:
        raise ValueError(f"the U-Net's levels have different numbers of layers (downsampling at input blocks {ends})")
    firsts = [level * per_level + 1 for level in range(len(ends) + 1)]
    return UnetLayout(per_level - 1, tuple(f"input_blocks.{n}.1.proj_in.weight" in ldm_shapes for n in firsts))


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """Arguments of diffusers' UNet2DConditionModel for an SD 1.x U-Net."""
    levels = range(count(shapes, r"down_blocks\.(\d+)\."))
    channels = tuple(shape_of(shapes, f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in levels)
    stems = [f"down_blocks.{i}.attentions.0" for i in levels]
    has_attention = [f"{stem}.proj_in.weight" in shapes for stem in stems]
    sample = next((stem for stem, has in zip(stems, has_attention, strict=True) if has), "mid_block.attentions.0")
    # A level without attention has the middle's depth: diffusers builds the middle like the coarsest level.
    depths = tuple(
        num_transformers(shapes, stem if has else "mid_block.attentions.0")
        for stem, has in zip(stems, has_attention, strict=True)
    )
    heads = [heads_of(width, NUM_HEADS) for width in channels]
    return {
        "in_channels": shape_of(shapes, "conv_in.weight")[1],
        "out_channels": shape_of(shapes, "conv_out.weight")[0],
        "block_out_channels": channels,
        "layers_per_block": count(shapes, r"down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in has_attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(has_attention)),
        "cross_attention_dim": shape_of(shapes, f"{sample}.transformer_blocks.0.attn2.to_k.weight")[1],
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else tuple(heads),  # diffusers means their number
        "use_linear_projection": len(shape_of(shapes, f"{sample}.proj_in.weight")) == 2,
        "norm_num_groups": norm_groups(*channels),
    }


def num_transformers(shapes: Shapes, stem: str) -> int:
    """Transformer blocks in the attention at `stem`."""
    return count(shapes, rf"{re.escape(stem)}\.transformer_blocks\.(\d+)\.")


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """Arguments of diffusers' AutoencoderKL."""
    levels = range(count(shapes, r"encoder\.down_blocks\.(\d+)\."))
    channels = tuple(shape_of(shapes, f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in levels)
    return {
        "in_channels": shape_of(shapes, "encoder.conv_in.weight")[1],
        "out_channels": shape_of(shapes, "decoder.conv_out.weight")[0],
        "latent_channels": shape_of(shapes, "decoder.conv_in.weight")[1],
        "block_out_channels": channels,
        "layers_per_block": count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
        "norm_num_groups": norm_groups(*channels),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def clip_config(shapes: Shapes) -> dict[str, Any]:
    """Arguments of transformers' CLIPTextConfig for OpenAI's CLIP, names without "text_model."."""
    vocab, width = shape_of(shapes, "embeddings.token_embedding.weight")
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": shape_of(shapes, "encoder.layers.0.mlp.fc1.weight")[0],
        "num_hidden_layers": count(shapes, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": heads_of(width, width // CLIP_HEAD_WIDTH),
        "max_position_embeddings": shape_of(shapes, "embeddings.position_embedding.weight")[0],
        "hidden_act": "quick_gelu",
        "bos_token_id": vocab - 2,
        "eos_token_id": vocab - 1,
        "pad_token_id": vocab - 1,
    }
