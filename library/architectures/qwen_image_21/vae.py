"""The VAE of Qwen-Image 2.1 (diffusers' AutoencoderKLQwenImage21), from its own layout or ComfyUI's single file.

It encodes RGBA images; images without alpha get an opaque channel. Letters: B samples, C channels, H and W sides.
"""

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from library.base.errors import about
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.weights import configure, list_first_names, rename_weights, select_weights
from library.memory.devices import send
from library.models.loading import Component, empty_diffusers_model, load_component
from library.models.shapes import Shapes, count, shape_of
from library.models.vae.flux import find_vae
from library.models.vae.qwen_image import encode_frame, outside_levels, rename_in_block
from library.protocols import LatentSpec

FLAG = "--vae"
CHANNELS = 64
MAX_REFERENCES = 10  # the model has no limit; each reference adds as many tokens as an image of its size
SPEC = LatentSpec(CHANNELS, 16, 32, "_qwen_image_21.npz", False, MAX_REFERENCES, has_alpha=True, patch=2)

MARKS = ("decoder.conv_in.weight", "decoder.conv1.weight")  # of diffusers' layout and of ComfyUI's


def encode_rgba(vae: Any, pixels_BCHW: Tensor) -> Tensor:
    """Return the posterior's mean, BCHW. Pixels without alpha are opaque."""
    if pixels_BCHW.shape[1] == 3:
        pixels_BCHW = pad(pixels_BCHW, (0, 0, 0, 0, 0, 1), value=1.0)
    if not vae.use_tiling:
        return encode_frame(vae, pixels_BCHW)
    # Tiling needs a call of the whole VAE.
    mean: Tensor = vae.encode(pixels_BCHW[:, :, None].to(vae.device, vae.dtype)).latent_dist.mean
    return mean[:, :, 0]


def decode_rgba(vae: Any, latents_BCHW: Tensor) -> Tensor:
    """Decode to RGBA images of values -1..1, float32."""
    frames = latents_BCHW[:, :, None].to(vae.device, vae.dtype)
    if vae.use_tiling:
        decoded = vae.decode(frames).sample
    else:
        decoded = vae.decoder(vae.post_quant_conv(frames), first_chunk=True)
    # diffusers clamps in `decode`, which is not called without tiling.
    pixels_BCHW: Tensor = decoded[:, :, 0].float().clamp(-1, 1)
    return pixels_BCHW


def statistics(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the latents, each (C, 1, 1), float32."""
    values = torch.tensor([vae.config.latents_mean, vae.config.latents_std])
    mean_C, deviation_C = send(values, device)
    return mean_C[:, None, None], deviation_C[:, None, None]


def open_vae(model: str, name: str | None, base: BaseFiles) -> Component:
    """Open the VAE from --vae or from the base model. Raises UserError for another kind of VAE."""
    flag, config, weights = find_vae(name, base, FLAG, MARKS)
    if MARKS[1] in weights.shapes:
        weights = rename_weights(weights, from_comfy)
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    weights = select_weights(weights, {key: key for key in weights.shapes if key.startswith(parts)})
    if "encoder.down_blocks.0.resnets.0.norm1.gamma" not in weights.shapes:
        raise about(flag, weights.origin)(f"is not the VAE of {model} (first names: {list_first_names(weights)})")
    component = Component(config or configure(weights, vae_config), weights)
    num_channels = shape_of(weights.shapes, MARKS[0])[1]
    if num_channels != CHANNELS:
        raise about(flag, weights.origin, cause="does not fit")(
            f"has {num_channels} latent channels, but {model} needs {CHANNELS}", "use its own VAE"
        )
    return component


def from_comfy(key: str) -> str:
    """Return diffusers' name of a weight in ComfyUI's file, where a level lists its blocks, then its resampling."""
    if match := re.fullmatch(r"(encoder|decoder)\.(down|up)samples\.(\d+)\.\2samples\.(\d+)\.(.+)", key):
        part, way, level, index, tail = match.groups()
        resamples = tail.startswith(("resample.", "time_conv."))
        inside = f"{way}sampler" if resamples else f"resnets.{index}"
        return f"{part}.{way}_blocks.{level}.{inside}.{rename_in_block(tail)}"
    return outside_levels(key)


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """Return the arguments of diffusers' AutoencoderKLQwenImage21, from names in its layout."""
    levels = range(count(shapes, r"encoder\.down_blocks\.(\d+)\."))
    base, in_channels = shape_of(shapes, "encoder.conv_in.weight")[:2]
    widths = [shape_of(shapes, f"encoder.down_blocks.{level}.resnets.0.conv1.weight")[0] for level in levels]
    mult = [width // base for width in widths]
    return {
        "base_dim": base,
        "decoder_base_dim": shape_of(shapes, "decoder.conv_out.weight")[1] // mult[0],
        "z_dim": shape_of(shapes, MARKS[0])[1],
        "dim_mult": mult,
        "num_res_blocks": count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "temperal_downsample": [f"encoder.down_blocks.{n}.downsampler.time_conv.weight" in shapes for n in levels[:-1]],
        "in_channels": in_channels,
        "out_channels": shape_of(shapes, "decoder.conv_out.weight")[0],
    }


empty_vae = partial(empty_diffusers_model, "AutoencoderKLQwenImage21")
load_qwen_image_21_vae = partial(load_component, empty_vae)
