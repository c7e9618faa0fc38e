"""The VAE of latent diffusion (diffusers' AutoencoderKL), from a file in either layout or from a folder."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from library.base.errors import NotThere, about
from library.checkpoints import model_lookup
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.weights import (
    Weights,
    configure,
    list_first_names,
    rename_weights,
    select_weights,
    with_prefix,
)
from library.memory.devices import DTYPES
from library.models.loading import Component, LoadPart, empty_diffusers_model, load_component
from library.models.shapes import Shapes, count, norm_groups, shape_of
from library.models.vae.checkpoint_keys import VAE_PREFIX, vae_from_ldm, vae_from_old_diffusers
from library.options.model import ModelOptions

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class VaeNeeds:
    """A base model's requirements for its VAE."""

    base: str  # its name in messages
    channels: int  # of the latents
    scale: float  # scales latents to about unit variance


@dataclass(frozen=True)
class TransformerVae:
    """A transformer's VAE: how it is opened and loaded, and how many values it gives for each `unit`."""

    open: Callable[[str, str | None, BaseFiles], Component]  # title of the base model, name of the VAE, base
    load: LoadPart
    num_inputs: int
    unit: str  # "token", "patch"


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """Return the arguments of diffusers' AutoencoderKL."""
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
        # VAEs with 16 channels have neither of the two.
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


empty_vae = partial(empty_diffusers_model, "AutoencoderKL")
load_vae = partial(load_component, empty_vae)


def vae_of_checkpoint(flag: str, weights: Weights) -> Component:
    """Return the VAE in a whole checkpoint. Raises NotThere naming `flag` if it has none."""
    vae = with_prefix(weights, VAE_PREFIX)
    if not vae.shapes:
        why = f"{flag} {weights.origin} has no VAE (nothing begins with {VAE_PREFIX!r}); use --vae"
        raise NotThere(why, setting="--vae", others=[flag], path=weights.origin)
    return single_vae(vae)


def vae_of_folder(config: Mapping[str, Any], weights: Weights) -> Component:
    """Build the VAE of a diffusers folder."""
    return Component(config, rename_weights(weights, vae_from_old_diffusers))


def vae_of_base(base: BaseFiles) -> Component:
    """Return the VAE of a base model. Raises NotThere if it has none."""
    return vae_of_folder(*base.open_folder("vae")) if base.whole is None else vae_of_checkpoint(base.flag, base.whole)


def resolve_vae_dtype(model: ModelOptions, mixed_precision: str) -> torch.dtype:
    """Return the dtype that the VAE computes in: float32 with --no_half_vae, else that of --mixed_precision."""
    return torch.float32 if model.no_half_vae else DTYPES[mixed_precision]


def open_vae(name: str, needs: VaeNeeds) -> Component:
    """Open the VAE of --vae: a file in either layout, its own folder, a diffusers folder with vae/, or a hub name.

    Raises UserError if it is something else or has another number of channels; warns of another scale of latents.
    """
    config, weights = model_lookup.open_model("--vae", name, "vae")
    if config is not None:
        refuse_no_vae(name, weights, needs.base)
        component = vae_of_folder(config, weights)
        # Folders saved by early versions of diffusers do not name it; this is diffusers' default.
        scale = config.get("scaling_factor", 0.18215)
        if scale != needs.scale:
            logger.warning(
                "--vae %s is made for latents scaled by %s, but %s scales by %s", name, scale, needs.base, needs.scale
            )
    else:
        if any(key.startswith(VAE_PREFIX) for key in weights.shapes):
            weights = with_prefix(weights, VAE_PREFIX)
        refuse_no_vae(name, weights, needs.base)
        component = single_vae(weights)
    channels = component.weights.shapes["decoder.conv_in.weight"][1]
    if channels != needs.channels:
        raise about("--vae", cause="does not fit")(
            f"{name} has {channels} latent channels, but {needs.base} needs {needs.channels}", "use its own VAE"
        )
    return component


def refuse_no_vae(name: str, weights: Weights, base: str) -> None:
    """Raise UserError if --vae names something other than a VAE for the base model called `base`."""
    if "decoder.conv_in.weight" not in weights.shapes:
        first = list_first_names(weights)
        raise about("--vae")(f"{name} is not a VAE for {base}: it has no decoder.conv_in.weight (first names: {first})")


def single_vae(weights: Weights, more: tuple[str, ...] = ()) -> Component:
    """Build a VAE's component from one file's weights without prefix, in Stability's or diffusers' layout.

    Keeps the VAE's weights and those that begin with one of `more`; drops the rest, such as leftovers of training.
    """
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", *more)
    weights = select_weights(weights, {key: key for key in weights.shapes if key.startswith(parts)})
    if any(key.startswith("encoder.down_blocks.") for key in weights.shapes):
        weights = rename_weights(weights, vae_from_old_diffusers)
    else:
        num_levels = count(weights.shapes, r"decoder\.up\.(\d+)\.")
        weights = rename_weights(weights, lambda key: vae_from_ldm(key, num_levels))
    return Component(configure(weights, vae_config), weights)
