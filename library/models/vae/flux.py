"""The 16-channel VAE of FLUX.1 ("ae.safetensors") and later models: its files and its latents."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from library.base.errors import NotThere, about
from library.checkpoints import model_lookup
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.weights import Weights, list_first_names, with_prefix
from library.models.loading import Component
from library.models.shapes import shape_of
from library.models.vae.checkpoint_keys import VAE_PREFIXES
from library.models.vae.latents import KlLatents
from library.models.vae.vae import single_vae, vae_of_folder
from library.protocols import POSTERIOR_MEAN, LatentSpec

logger = logging.getLogger(__name__)

CHANNELS = 16
SCALE, SHIFT = 0.3611, 0.1159
FOLDER = "vae"  # in a diffusers folder
MARK = "decoder.conv_in.weight"


def map_latents(cache_suffix: str, max_references: int = 0, takes_mean: bool = False) -> KlLatents:
    """Return the latents of a base model whose tokens are 2 x 2 latents, with 16 channels and 8 pixels a side."""
    computed_as = POSTERIOR_MEAN if takes_mean else ""
    spec = LatentSpec(CHANNELS, 8, 16, cache_suffix, False, max_references, patch=2, computed_as=computed_as)
    return KlLatents(spec, SCALE, SHIFT, caches_normalized=True, takes_mean=takes_mean)


def open_ae(model: str, name: str | None, base: BaseFiles, flag: str = "--ae") -> Component:
    """Open the VAE from the file or folder of `flag`, or from the base model, in the original layout or diffusers'.

    `model` is the base model's name in messages.
    """
    flag, config, weights = find_vae(name, base, flag)
    component = single_vae(weights) if config is None else vae_of_folder(config, weights)
    check_channels(model, flag, component, CHANNELS)
    scale, shift = component.config.get("scaling_factor"), component.config.get("shift_factor")
    if (scale or SCALE, shift or SHIFT) != (SCALE, SHIFT):
        logger.warning(
            "%s %s has shift %s and scale %s, but %s uses %s and %s",
            flag, component.weights.origin, shift, scale, model, SHIFT, SCALE,
        )  # fmt: skip
    return component


def find_vae(
    name: str | None, base: BaseFiles, flag: str, marks: Sequence[str] = (MARK,)
) -> tuple[str, Mapping[str, Any] | None, Weights]:
    """Open the VAE that `name` names, or without a name the base model's.

    Return the flag that named it, the configuration of a folder (None for a file), and the VAE's weights without
    prefix. Raises UserError for a file without any of the weights `marks`, NotThere if the base model has no VAE.
    """
    if name is not None:
        config, weights = model_lookup.open_model(flag, name, FOLDER)
        if config is not None:
            return flag, config, weights
    elif base.whole is None:
        return base.flag, *base.open_folder(FOLDER)
    else:
        weights = base.whole
    # In a base model's file, names without a prefix belong to the denoiser.
    prefixes = VAE_PREFIXES if name is not None else VAE_PREFIXES[:-1]
    prefix = next((p for p in prefixes if any(f"{p}{mark}" in weights.shapes for mark in marks)), None)
    if prefix is None:
        if name is None:
            raise about(flag, kind=NotThere)(f"is missing: {base.path} contains no VAE", "name its file or folder")
        first = list_first_names(weights)
        raise about(flag)(f"{name} is not a VAE: it has no {marks[0]} (first names: {first})")
    return flag, None, with_prefix(weights, prefix)


def check_channels(model: str, flag: str, component: Component, num_channels: int) -> None:
    """Raise UserError if a VAE's number of latent channels differs from the base model's."""
    channels = shape_of(component.weights.shapes, "decoder.conv_in.weight")[1]
    if channels != num_channels:
        raise about(flag, component.weights.origin, cause="does not fit")(
            f"has {channels} latent channels, but {model} needs {num_channels}", "use its ae.safetensors"
        )
