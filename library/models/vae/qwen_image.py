"""The VAE of Qwen-Image (diffusers' AutoencoderKLQwenImage), from its original single file, in Wan's layout, or from
one in diffusers' layout.

It is a video VAE derived from Wan's; an image is a video's first frame.
"""

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor

from library.base.errors import NotThere, about
from library.checkpoints import model_lookup
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.weights import Weights, configure, list_first_names, rename_weights, with_prefix
from library.memory.devices import send
from library.models.loading import Component, empty_diffusers_model, load_component
from library.models.shapes import Shapes, shape_of
from library.models.vae.latents import NormalizedLatents
from library.protocols import LatentSpec

FLAG = "--vae"
FOLDER = "vae"
FILE = "qwen_image_vae.safetensors"
CHANNELS, DOWNSCALE = 16, 8
WHOLE = "vae."  # prefix of its names in a file with several models
MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

ENDS = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
RESIDUAL = {
    "residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}  # fmt: skip
QUANT = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
ORIGINAL_MARK, DIFFUSERS_MARK = "decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma"


def encode_frame(vae: Any, pixels_BCHW: Tensor) -> Tensor:
    """Return the posterior's mean of images, BCHW."""
    # The parts are called one by one: a call of the whole VAE caches every layer's input for a next frame, which an
    # image does not have.
    frames = pixels_BCHW[:, :, None].to(vae.device, vae.dtype)
    mean: Tensor = vae.quant_conv(vae.encoder(frames)).chunk(2, dim=1)[0]
    return mean[:, :, 0]


def decode_frame(vae: Any, latents_BCHW: Tensor) -> Tensor:
    """Decode to images of values -1..1, float32: clamped as in a call of diffusers' VAE."""
    frames = latents_BCHW[:, :, None].to(vae.device, vae.dtype)
    pixels_BCHW: Tensor = vae.decoder(vae.post_quant_conv(frames))[:, :, 0]
    return pixels_BCHW.float().clamp(-1, 1)


def statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel, each (1, C, 1, 1); every VAE has the same."""
    mean, std = (send(torch.tensor(values), device).view(1, -1, 1, 1) for values in (MEAN, STD))
    return mean, std


def qwen_image_latents(cache_suffix: str, max_references: int = 0) -> NormalizedLatents:
    """Return the latents of a base model whose tokens are 2 x 2 latents."""
    spec = LatentSpec(CHANNELS, DOWNSCALE, 16, cache_suffix, False, max_references, patch=2)
    return NormalizedLatents(spec, statistics, encode_frame, decode_frame)


def open_vae(model: str, name: str | None, base: BaseFiles | None = None) -> Component:
    """Open the VAE of --vae, or without a name that of the base model's folder or file.

    `model` is the base model's name in messages. Raises UserError naming the flag if the VAE is missing or something
    else.
    """
    if name is not None:
        return vae_component(model, model_lookup.open_model(FLAG, name, FOLDER)[1])
    if base is not None and base.whole is None:
        return vae_component(model, base.open_folder(FOLDER)[1])
    weights = with_prefix(base.whole, WHOLE) if base is not None and base.whole is not None else None
    if weights is None or not weights.shapes:
        raise about(FLAG, kind=NotThere)(f"is missing: use {FILE}, or a folder in diffusers' layout")
    return vae_component(model, weights)


def vae_component(model: str, weights: Weights) -> Component:
    """Build the VAE's component from shapes. Raises UserError if the weights are something else."""
    if ORIGINAL_MARK in weights.shapes:
        num_blocks = first_resample(weights.shapes)
        weights = rename_weights(weights, lambda key: from_original(key, num_blocks))
    elif DIFFUSERS_MARK not in weights.shapes:
        raise about(FLAG, weights.origin)(f"is not the VAE of Qwen-Image (first names: {list_first_names(weights)})")
    component = Component(configure(weights, vae_config), weights)
    channels = component.config["z_dim"]
    if channels != CHANNELS:
        raise about(FLAG, weights.origin, cause="does not fit")(
            f"has {channels} latent channels, but {model} needs {CHANNELS}", f"use {FILE}"
        )
    return component


def first_resample(shapes: Shapes) -> int:
    """Return the number of residual blocks in each level of the decoder."""
    numbers = [int(m[1]) for key in shapes if (m := re.match(r"decoder\.upsamples\.(\d+)\.resample\.", key))]
    return min(numbers, default=len(shapes))


def from_original(key: str, num_blocks: int) -> str:
    """Return diffusers' name of a weight of the original layout, whose decoder has `num_blocks` residual blocks per
    level.

    The original layout numbers the layers of all levels consecutively: a level's blocks, then its resampling layer.
    """
    if match := re.fullmatch(r"encoder\.downsamples\.(\d+)\.(.+)", key):
        return f"encoder.down_blocks.{match[1]}.{rename_in_block(match[2])}"
    if match := re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.+)", key):
        level, index = divmod(int(match[1]), num_blocks + 1)
        layer = "upsamplers.0" if index == num_blocks else f"resnets.{index}"
        return f"decoder.up_blocks.{level}.{layer}.{rename_in_block(match[2])}"
    return outside_levels(key)


def outside_levels(key: str) -> str:
    """Return diffusers' name of a weight of Wan's layout outside the levels; other names are unchanged."""
    if match := re.fullmatch(r"(conv[12])\.(\w+)", key):
        return f"{QUANT[match[1]]}.{match[2]}"
    if match := re.fullmatch(r"(encoder|decoder)\.(conv1|head\.[02])\.(\w+)", key):
        return f"{match[1]}.{ENDS[match[2]]}.{match[3]}"
    if match := re.fullmatch(r"(encoder|decoder)\.middle\.([012])\.(.+)", key):
        return f"{match[1]}.mid_block.{MIDDLE[match[2]]}.{rename_in_block(match[3])}"
    return key


def rename_in_block(tail: str) -> str:
    """Return diffusers' name of a weight inside a residual block; attention and resampling layers keep theirs."""
    stem, _, leaf = tail.rpartition(".")
    return f"{RESIDUAL.get(stem, stem)}.{leaf}"


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """Return the arguments of diffusers' AutoencoderKLQwenImage, from names in its layout."""
    base = shape_of(shapes, "encoder.conv_in.weight")[0]
    layers = sorted({int(m[1]) for key in shapes if (m := re.match(r"encoder\.down_blocks\.(\d+)\.", key))})
    resampling = [n for n in layers if f"encoder.down_blocks.{n}.resample.1.weight" in shapes]
    last_blocks = [n - 1 for n in resampling] + layers[-1:]  # the last residual block of each level
    return {
        "base_dim": base,
        "z_dim": shape_of(shapes, "decoder.conv_in.weight")[1],
        "dim_mult": [shape_of(shapes, f"encoder.down_blocks.{n}.conv1.weight")[0] // base for n in last_blocks],
        "num_res_blocks": resampling[0] if resampling else len(layers),
        # diffusers' spelling.
        "temperal_downsample": [f"encoder.down_blocks.{n}.time_conv.weight" in shapes for n in resampling],
        "input_channels": shape_of(shapes, "encoder.conv_in.weight")[1],
    }


empty_vae = partial(empty_diffusers_model, "AutoencoderKLQwenImage")
load_vae = partial(load_component, empty_vae)
