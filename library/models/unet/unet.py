"""The U-Net of Stable Diffusion 1, 2 and XL (diffusers' UNet2DConditionModel), configured from its shapes."""

import logging
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library.base.errors import UserError, error_in
from library.checkpoints.weights import Weights, configure, rename_weights
from library.diffusion.inpainting import FEATURE
from library.memory.blocks import BlockRunner, Stacks, run_library_blocks_with
from library.models.loading import Component, empty_diffusers_model
from library.models.shapes import Shapes, choose_num_heads, count, norm_groups, shape_of
from library.models.unet.checkpoint_keys import UnetLayout, unet_from_ldm
from library.types import Conditioning, Noised

logger = logging.getLogger(__name__)

NUM_HEADS = 8  # in every level of SD 1.x
HEAD_WIDTH = 64  # in every level of SD 2.x and SDXL, whose number of heads grows with the channels
MASK_CHANNELS = 5  # extra input channels of an inpainting U-Net: the mask, and latents of the kept area
NUM_SIZES = 6  # numbers that SDXL is conditioned on besides the text


def unet_component(ldm: Weights, head_width: int | None = None) -> Component:
    """Build the component of a single file's U-Net, names without prefix; `head_width` None: 8 heads at every level."""
    layout = configure(ldm, unet_layout)
    weights = rename_weights(ldm, lambda key: unet_from_ldm(key, layout))
    return Component(configure(weights, lambda shapes: unet_config(shapes, head_width)), weights)


def unet_layout(ldm_shapes: Shapes) -> UnetLayout:
    """Return layers per block and attention levels of a U-Net in the single-file layout, names without prefix."""
    num_blocks = count(ldm_shapes, r"input_blocks\.(\d+)\.")
    # Downsampling ends a level: with two residual blocks per level, it is in input blocks 3, 6 and 9.
    ends = [n for n in range(num_blocks) if f"input_blocks.{n}.0.op.weight" in ldm_shapes]
    per_level = ends[0] if ends else num_blocks
    if ends != [per_level * (level + 1) for level in range(len(ends))]:
        raise UserError(f"the U-Net's levels have different numbers of layers (downsampling at input blocks {ends})")
    firsts = [level * per_level + 1 for level in range(len(ends) + 1)]
    return UnetLayout(per_level - 1, tuple(f"input_blocks.{n}.1.proj_in.weight" in ldm_shapes for n in firsts))


def layout_of_config(config: Mapping[str, Any]) -> UnetLayout:
    """Return the layout that the configuration in a diffusers folder describes."""
    attends = tuple(block_type.startswith("CrossAttn") for block_type in config.get("down_block_types", ()))
    return UnetLayout(int(config.get("layers_per_block", 2)), attends)


def unet_config(shapes: Shapes, head_width: int | None = None) -> dict[str, Any]:
    """Return the arguments of diffusers' UNet2DConditionModel."""
    levels = range(count(shapes, r"down_blocks\.(\d+)\."))
    channels = tuple(shape_of(shapes, f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in levels)
    stems = [f"down_blocks.{i}.attentions.0" for i in levels]
    has_attention = [f"{stem}.proj_in.weight" in shapes for stem in stems]
    attention = next((stem for stem, has in zip(stems, has_attention, strict=True) if has), "mid_block.attentions.0")
    # Levels without attention get the middle's depth: diffusers builds the middle like the coarsest level.
    depths = tuple(
        count(shapes, rf"{re.escape(stem if has else 'mid_block.attentions.0')}\.transformer_blocks\.(\d+)\.")
        for stem, has in zip(stems, has_attention, strict=True)
    )
    heads = [choose_num_heads(width, width // head_width if head_width else NUM_HEADS) for width in channels]
    return {
        "in_channels": shape_of(shapes, "conv_in.weight")[1],
        "out_channels": shape_of(shapes, "conv_out.weight")[0],
        "block_out_channels": channels,
        "layers_per_block": count(shapes, r"down_blocks\.0\.resnets\.(\d+)\."),
        "down_block_types": tuple("CrossAttnDownBlock2D" if has else "DownBlock2D" for has in has_attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if has else "UpBlock2D" for has in reversed(has_attention)),
        "cross_attention_dim": shape_of(shapes, f"{attention}.transformer_blocks.0.attn2.to_k.weight")[1],
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        # diffusers uses this name for the number of heads.
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else tuple(heads),
        "use_linear_projection": len(shape_of(shapes, f"{attention}.proj_in.weight")) == 2,
        "norm_num_groups": norm_groups(*channels),
    }


def size_embedding_config(shapes: Shapes, pooled_width: int) -> dict[str, Any]:
    """Return the additional arguments of a U-Net that is conditioned on a pooled text vector and six sizes."""
    width = shape_of(shapes, "add_embedding.linear_1.weight")[1]
    if width <= pooled_width or (width - pooled_width) % (2 * NUM_SIZES):
        raise UserError(
            f"add_embedding.linear_1.weight takes {width} numbers, which do not match {pooled_width} of the text "
            f"encoder and {NUM_SIZES} sizes; U-Net and text encoder belong to different models"
        )
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": (width - pooled_width) // NUM_SIZES,
        "projection_class_embeddings_input_dim": width,
    }


empty_unet = partial(empty_diffusers_model, "UNet2DConditionModel")


def unet_input(noised: Noised, conditioning: Conditioning) -> Tensor:
    """Return the noisy latents, with the mask channels appended for an inpainting model."""
    if FEATURE not in conditioning:
        return noised.latents_BCHW
    return torch.cat([noised.latents_BCHW, conditioning[FEATURE].to(noised.latents_BCHW)], 1)


def check_unet_input(what: str, unet: Component, num_latent_channels: int, inpaints: bool) -> None:
    """Raise UserError if the U-Net of the checkpoint `what` does not fit the inputs of training.

    With `inpaints` a plain U-Net gets only a warning, and `widen_for_inpainting` widens it.
    """
    channels = unet.config.get("in_channels", num_latent_channels)
    if channels == num_latent_channels:
        if inpaints:
            logger.warning(
                "--train_inpainting: the U-Net of %s takes %d channels, so it cannot use masks. It is widened with "
                "frozen zeros, as sd-scripts does: the adapter learns the images, but not to inpaint. Use an "
                "inpainting checkpoint, which takes %d channels, to train both",
                what,
                channels,
                channels + MASK_CHANNELS,
            )
    elif channels != num_latent_channels + MASK_CHANNELS:
        raise UserError(
            f"{what}: the U-Net takes {channels} input channels, but only {num_latent_channels} (plain) and "
            f"{num_latent_channels + MASK_CHANNELS} (inpainting) are supported"
        )
    elif not inpaints:
        raise error_in("--train_inpainting", cause="needs")(
            f"{what} is an inpainting model (its U-Net takes {channels} channels)",
            "add --train_inpainting, which requires images, or use the plain model",
        )


def widen_for_inpainting(unet: Any, num_latent_channels: int) -> Any:
    """Add zero weights for the mask channels to the first layer if it lacks them; its output does not change."""
    if unet.config.in_channels == num_latent_channels:
        conv = unet.conv_in
        weight = torch.cat([conv.weight, conv.weight.new_zeros(len(conv.weight), MASK_CHANNELS, 3, 3)], 1)
        conv.weight = nn.Parameter(weight, requires_grad=False)
        conv.in_channels = weight.shape[1]
        unet.register_to_config(in_channels=weight.shape[1])
    return unet


def run_unet_blocks_with(unet: nn.Module, runner: BlockRunner) -> None:
    """Route the blocks of diffusers' U-Net through `runner`."""
    for blocks in unet_stacks(unet):
        run_library_blocks_with(blocks, runner)


def unet_stacks(unet: nn.Module) -> Stacks:
    """Return the residual and transformer blocks of diffusers' U-Net, which take nearly all of its time."""
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.resnet import ResnetBlock2D

    return [[module for module in unet.modules() if isinstance(module, BasicTransformerBlock | ResnetBlock2D)]]


def unet_chains(unet: nn.Module) -> list[nn.ModuleList]:
    """Return the transformer blocks of each attention. Residual blocks feed the up path too and cannot be left out."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    return [module.transformer_blocks for module in unet.modules() if isinstance(module, Transformer2DModel)]
