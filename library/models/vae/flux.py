"""The VAE of 16 channels that FLUX.1 came with ("ae.safetensors") and others took over: its files and its latents."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.checkpoints import model_lookup
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.weights import first_names, with_prefix
from library.errors import NotThere, UserError
from library.models.loading import Component
from library.models.shapes import shape_of
from library.models.vae.checkpoint_keys import VAE_PREFIXES
from library.models.vae.latents import KlLatents
from library.models.vae.vae import single_vae, vae_of_folder
from library.protocols import LatentSpec

logger = logging.getLogger(__name__)

CHANNELS = 16
SCALE, SHIFT = 0.3611, 0.1159
FOLDER = "vae"  # of a diffusers folder


@dataclass(frozen=True)
class MappedLatents:
    """Latents of 16 channels, 8 pixels a side; the cache keeps them shifted and scaled, as the denoiser sees them."""

    spec: LatentSpec

    def encode(self, vae: nn.Module, pixels_BCHW: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Samples of the posterior less 0.1159, times 0.3611, float32."""
        latents = KlLatents(self.spec, SCALE, SHIFT)
        return latents.normalize(latents.encode(vae, pixels_BCHW, generators))

    def normalize(self, latents_BCHW: Tensor) -> Tensor:
        return latents_BCHW

    def decode(self, vae: nn.Module, latents_BCHW: Tensor) -> Tensor:
        """Pictures, float32, about -1..1, of latents as the denoiser sees them."""
        return KlLatents(self.spec, SCALE, SHIFT).decode(vae, latents_BCHW)


def mapped_latents(cache_suffix: str) -> MappedLatents:
    """The latents of a base model that reads two by two of them as a token."""
    return MappedLatents(
        LatentSpec(CHANNELS, 8, bucket_step=16, cache_suffix=cache_suffix, had_keys_without_size=False)
    )


def open_ae(model: str, name: str | None, base: BaseFiles) -> Component:
    """The VAE from --ae, or from the base model, in the original layout or diffusers'.

    `model` is what messages call the base model.
    """
    if name is not None:
        config, weights = model_lookup.open_model("--ae", name, FOLDER)
        if config is not None:
            return checked_ae(model, "--ae", vae_of_folder(config, weights))
    elif base.whole is None:
        return checked_ae(model, base.flag, vae_of_folder(*base.open_folder(FOLDER)))
    else:
        weights = base.whole
    prefixes = VAE_PREFIXES if name is not None else VAE_PREFIXES[:-1]
    prefix = next((p for p in prefixes if f"{p}decoder.conv_in.weight" in weights.shapes), None)
    if prefix is None:
        if name is None:
            raise NotThere(f"--ae is missing: {base.path} has no VAE in it; give ae.safetensors")
        first = first_names(weights)
        raise UserError(f"--ae {name} is no VAE: it has no decoder.conv_in.weight (first names: {first})")
    return checked_ae(model, "--ae", single_vae(with_prefix(weights, prefix)))


def checked_ae(model: str, flag: str, component: Component) -> Component:
    """Raise UserError where a VAE makes other latents than the base model's."""
    channels = shape_of(component.weights.shapes, "decoder.conv_in.weight")[1]
    if channels != CHANNELS:
        raise UserError(
            f"{flag} {component.weights.origin} has {channels} latent channels, {model} needs {CHANNELS}; use its "
            "ae.safetensors"
        )
    config: Mapping[str, object] = component.config
    scale, shift = config.get("scaling_factor"), config.get("shift_factor")
    if (scale or SCALE, shift or SHIFT) != (SCALE, SHIFT):
        logger.warning(
            "%s %s is made for latents less %s, times %s; %s takes %s and %s",
            flag, component.weights.origin, shift, scale, model, SHIFT, SCALE,
        )  # fmt: skip
    return component
