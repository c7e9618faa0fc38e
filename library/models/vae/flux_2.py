"""The VAE of FLUX.2 (diffusers' AutoencoderKLFlux2), which MOSS-Image uses too, from the original single file or from
diffusers' layout.

Its latents of 32 channels are packed 2 x 2 into 128 and normalized by the statistics of the VAE's batch norm. Letters:
B samples, C channels, H and W sides.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from library.base.errors import about
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.weights import rename_weights, select_weights
from library.memory.devices import send
from library.models.loading import Component, MaybeComponent, empty_diffusers_model, materialise
from library.models.shapes import count, shape_of
from library.models.vae.flux import check_channels, find_vae
from library.models.vae.latents import NormalizedLatents
from library.models.vae.vae import TransformerVae, single_vae, vae_of_folder
from library.protocols import LatentSpec

CHANNELS = 32
PATCH = 2
BATCH_NORM = "bn."
STATISTICS = ("running_mean", "running_var")
COUNTER = f"{BATCH_NORM}num_batches_tracked"  # of the VAE's own training; some files lack it
ORIGINAL = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}  # -> diffusers
PACKED_CHANNELS = CHANNELS * PATCH**2
DOWNSCALE = 16  # pixels per packed latent


def pack_latents(cache_suffix: str, max_references: int) -> NormalizedLatents:
    """Return the codec of a base model whose denoiser takes each packed latent as a token."""
    spec = LatentSpec(PACKED_CHANNELS, DOWNSCALE, DOWNSCALE, cache_suffix, False, max_references)
    return NormalizedLatents(spec, statistics, encode_packed, decode_packed)


def encode_packed(vae: Any, pixels_BCHW: Tensor) -> Tensor:
    return pixel_unshuffle(vae.encode(pixels_BCHW.to(vae.device, vae.dtype)).latent_dist.mean, PATCH)


def decode_packed(vae: Any, latents_BCHW: Tensor) -> Tensor:
    pixels_BCHW: Tensor = vae.decode(pixel_shuffle(latents_BCHW, PATCH).to(vae.device, vae.dtype)).sample
    return pixels_BCHW


def statistics(vae: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the packed latents, each (C, 1, 1), float32."""
    norm: Any = vae.get_submodule("bn")
    mean_C, variance_C = (send(getattr(norm, name), device).float() for name in STATISTICS)
    return mean_C[:, None, None], (variance_C + norm.eps).sqrt()[:, None, None]


def open_vae(model: str, name: str | None, base: BaseFiles) -> Component:
    """Open the VAE from --vae or from the base model. Raises UserError for another kind of VAE."""
    flag, config, weights = find_vae(name, base, "--vae")
    # A folder's config.json has the decoder's widths; for a file they are read from shapes.
    if config is None:
        weights = rename_weights(weights, original_to_diffusers)
        component = single_vae(weights, (BATCH_NORM,))
        component = Component({**component.config, **decoder_config(component.weights.shapes)}, component.weights)
    else:
        component = vae_of_folder(config, weights)
    check_channels(model, flag, component, CHANNELS)
    missing = [name for name in STATISTICS if f"{BATCH_NORM}{name}" not in component.weights.shapes]
    if missing:
        raise about(flag, component.weights.origin)(
            f"has no {BATCH_NORM}{missing[0]}, by which latents are normalized", f"use the VAE of {model}"
        )
    kept = {key: key for key in component.weights.shapes if key != COUNTER}
    return Component(component.config, select_weights(component.weights, kept))


def original_to_diffusers(key: str) -> str:
    """Return diffusers' name of a weight of the original layout, where only four names differ."""
    for ours, theirs in ORIGINAL.items():
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return key


def decoder_config(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the widths of the decoder's levels; in VAEs with a small decoder they differ from the encoder's."""
    levels = range(count(shapes, r"decoder\.up_blocks\.(\d+)\."))
    widths = [shape_of(shapes, f"decoder.up_blocks.{level}.resnets.0.conv1.weight")[0] for level in reversed(levels)]
    return {"decoder_block_out_channels": widths}


def empty_vae(config: Mapping[str, Any]) -> Any:
    """Build diffusers' AutoencoderKLFlux2 on the meta device; its batch norm is replaced by `BatchStatistics`."""
    # torch's batch norm would require the counter, which some files lack.
    vae = empty_diffusers_model("AutoencoderKLFlux2", config)
    with torch.device("meta"):
        vae.bn = BatchStatistics(vae.bn.num_features, vae.bn.eps)
    return vae


class BatchStatistics(nn.Module):
    """The statistics of the VAE's batch norm, by which latents are normalized."""

    def __init__(self, num_channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        for name in STATISTICS:
            self.register_buffer(name, torch.empty(num_channels))


def load_flux_2_vae(component: MaybeComponent, dtype: torch.dtype) -> nn.Module:
    """Load the VAE in `dtype`, its statistics in float32, frozen, on the CPU."""
    vae = materialise(empty_vae(component.config), component.weights, dtype)
    # Latents are normalized in float32, so the statistics are not rounded to the VAE's dtype.
    for name in STATISTICS:
        setattr(vae.get_submodule("bn"), name, component.weights.read(f"{BATCH_NORM}{name}").float())
    return vae


PACKED_VAE = TransformerVae(open_vae, load_flux_2_vae, PACKED_CHANNELS, "token")
