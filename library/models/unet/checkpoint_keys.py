"""Names of U-Net weights: Stability's single-file layout ("ldm") and the module paths of diffusers.

All functions transform names only, work for any number of levels and layers, and have inverses.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from library.models.names import inverse, swap_stem

UNET_PREFIX = "model.diffusion_model."
UNET_NAME = re.escape(UNET_PREFIX) + r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\."

UNET_STEMS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}
UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


@dataclass(frozen=True)
class UnetLayout:
    """The sizes that determine the block numbers of a single-file U-Net."""

    layers_per_block: int
    has_attention: tuple[bool, ...]  # by level, finest first

    @property
    def num_levels(self) -> int:
        return len(self.has_attention)


def swap_resnet(tail: str, names: Mapping[str, str]) -> str:
    return swap_stem(tail, names) or tail


def unet_from_ldm(key: str, layout: UnetLayout) -> str:
    """Return diffusers' name of a U-Net weight; `key` without "model.diffusion_model.". Unknown names are kept."""
    new = swap_stem(key, UNET_STEMS)
    if new is not None:
        return rename_mid(new, UNET_RESNET)
    match = re.fullmatch(r"(input_blocks|output_blocks)\.(\d+)\.(\d+)\.(.+)", key)
    if match is None:
        return key
    side, block, part, tail = match[1], int(match[2]), int(match[3]), match[4]
    per_level = layout.layers_per_block + 1
    down = side == "input_blocks"
    # Input block 0 is the first convolution.
    level, layer = divmod(block - 1 if down else block, per_level)
    stem = f"{'down' if down else 'up'}_blocks.{level}"
    if down and tail.startswith("op."):
        return f"{stem}.downsamplers.0.conv.{tail[3:]}"
    if not down and part > 0 and tail.startswith("conv."):
        return f"{stem}.upsamplers.0.{tail}"
    if part == 0:
        return f"{stem}.resnets.{layer}.{swap_resnet(tail, UNET_RESNET)}"
    return f"{stem}.attentions.{layer}.{tail}"


def unet_to_ldm(key: str, layout: UnetLayout) -> str:
    """Invert `unet_from_ldm`."""
    old = swap_stem(rename_mid(key, inverse(UNET_RESNET)), inverse(UNET_STEMS))
    if old is not None:
        return old
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", key)
    if match is None:
        return key
    side, level, kind, layer, tail = match[1], int(match[2]), match[3], int(match[4]), match[5]
    first = level * (layout.layers_per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layout.layers_per_block + 1}.0.op.{tail.removeprefix('conv.')}"
    if kind == "upsamplers":
        # Upsampling comes after the residual block, and after the attention if there is one.
        has_attention = layout.has_attention[layout.num_levels - 1 - level]
        return f"output_blocks.{first + layout.layers_per_block}.{2 if has_attention else 1}.{tail}"
    block = f"input_blocks.{first + layer + 1}" if side == "down" else f"output_blocks.{first + layer}"
    if kind == "resnets":
        return f"{block}.0.{swap_resnet(tail, inverse(UNET_RESNET))}"
    return f"{block}.1.{tail}"


def rename_mid(key: str, names: Mapping[str, str]) -> str:
    """Rename a key inside a residual block of the U-Net's middle; the block's path is diffusers'."""
    match = re.fullmatch(r"(mid_block\.resnets\.\d+)\.(.+)", key)
    return f"{match[1]}.{swap_resnet(match[2], names)}" if match else key
