"""The VAE of HunyuanImage 2.1 (diffusers' AutoencoderKLHunyuanImage), from the original single file or a folder."""

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad

from library.base.errors import of_file
from library.checkpoints.weights import Weights, configure, list_first_names, rename_weights, with_prefix
from library.models.loading import Component, MaybeComponent, empty_diffusers_model, load_component
from library.models.shapes import Shapes, count, shape_of
from library.models.vae.checkpoint_keys import VAE_MID, VAE_PREFIXES

SCALE = 0.75289
SAMPLE_SIZE = 384  # side of tiles, which are disabled
MARK = "decoder.conv_in.weight"
ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "proj"}


def vae_component(weights: Weights) -> Component:
    """Build the VAE from a single file. Raises UserError naming the file if it holds something else."""
    prefix = next((p for p in VAE_PREFIXES if f"{p}{MARK}" in weights.shapes), None)
    if prefix is None:
        raise of_file(weights.origin)(f"is not a VAE: it has no {MARK} (first names: {list_first_names(weights)})")
    weights = with_prefix(weights, prefix)
    if "encoder.down.0.block.0.conv1.weight" not in weights.shapes:
        raise of_file(weights.origin)(
            "is not a VAE of HunyuanImage 2.1 in the original layout",
            "use hunyuan_image_2.1_vae_fp16.safetensors, or the folder vae/ of a diffusers model",
        )
    config = configure(weights, vae_config)
    return Component(config, rename_weights(weights, lambda key: vae_from_original(key, config["layers_per_block"])))


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """Return the arguments of diffusers' AutoencoderKLHunyuanImage, from names of the original layout."""
    levels = range(count(shapes, r"encoder\.down\.(\d+)\."))
    num_halvings = sum(f"encoder.down.{level}.downsample.conv.weight" in shapes for level in levels)
    return {
        "in_channels": shape_of(shapes, "encoder.conv_in.weight")[1],
        "out_channels": shape_of(shapes, "decoder.conv_out.weight")[0],
        "latent_channels": shape_of(shapes, MARK)[1],
        "block_out_channels": [shape_of(shapes, f"encoder.down.{i}.block.0.conv1.weight")[0] for i in levels],
        "layers_per_block": count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
        "spatial_compression_ratio": 2**num_halvings,
        "sample_size": SAMPLE_SIZE,
        "scaling_factor": SCALE,
    }


def vae_from_original(key: str, layers_per_block: int) -> str:
    """Return diffusers' name of a weight: one list has the blocks of all levels, with a level's resampling last."""
    match = re.fullmatch(r"(encoder|decoder)\.mid\.(block_1|attn_1|block_2)\.(\w+)\.(.+)", key)
    if match:
        part, block, layer, leaf = match.groups()
        return f"{part}.mid_block.{VAE_MID[block]}.{ATTENTION.get(layer, layer)}.{leaf}"
    match = re.fullmatch(r"(encoder\.down|decoder\.up)\.(\d+)\.(?:block\.(\d+)|downsample|upsample)\.(.+)", key)
    if match is None:
        return key
    stack, level, block, leaf = match.groups()
    # The decoder has one block more than the encoder on each level.
    num_blocks = layers_per_block + (stack == "decoder.up")
    index = int(level) * (num_blocks + 1) + (num_blocks if block is None else int(block))
    return f"{stack}_blocks.{index}.{leaf.replace('nin_shortcut', 'conv_shortcut')}"


empty_vae = partial(empty_diffusers_model, "AutoencoderKLHunyuanImage")


class ChunkedConv2d(nn.Conv2d):
    """A convolution that computes `num_rows` rows of its output at a time: the same result in less memory."""

    num_rows: int

    def forward(self, input: Tensor) -> Tensor:
        height, border = input.shape[-2], int(self.padding[0])
        if height <= self.num_rows:
            return super().forward(input)
        # Pad above and below once: then every chunk sees the rows that the whole convolution would see.
        framed = pad(input, (0, 0, border, border))
        chunks = [
            conv2d(
                framed[..., first : min(first + self.num_rows, height) + 2 * border, :],
                self.weight,
                self.bias,
                padding=(0, int(self.padding[1])),
            )
            for first in range(0, height, self.num_rows)
        ]
        return torch.cat(chunks, dim=-2)


def compute_in_chunks(vae: nn.Module, num_rows: int) -> nn.Module:
    """Make the VAE's convolutions, all of stride 1, compute `num_rows` rows at a time; in place."""
    for layer in vae.modules():
        if type(layer) is nn.Conv2d:
            # Parameters, their names and their place in the model stay the same.
            layer.__class__ = ChunkedConv2d
            layer.num_rows = num_rows  # type: ignore[assignment]
    return vae


def load_hunyuan_image_vae(component: MaybeComponent, dtype: torch.dtype, chunk_rows: int | None) -> nn.Module:
    """Load the VAE in `dtype`, frozen, on the CPU; `chunk_rows` is how many rows its convolutions compute at once."""
    vae = load_component(empty_vae, component, dtype)
    return vae if chunk_rows is None else compute_in_chunks(vae, chunk_rows)
