"""The loader of the U-Net models, whose checkpoints contain U-Net, CLIP text encoders and VAE."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from library.base.errors import UserError, about
from library.checkpoints.base_files import BaseFiles, open_base
from library.environment.packages import import_needed
from library.memory.codecs.codec import RequestedFormat
from library.memory.devices import DTYPES
from library.models.clip.clip import CLIP_WORDS, load_clip
from library.models.identify import warn_of_other_prediction
from library.models.loading import Component, MaybeComponent, get_first_side, materialise, open_if_there
from library.models.unet.unet import check_unet_input, empty_unet, widen_for_inpainting
from library.models.vae.vae import VaeNeeds, load_vae, open_vae, resolve_vae_dtype, vae_of_base
from library.options.machine.memory import MemoryOptions
from library.options.train import TrainOptions

logger = logging.getLogger(__name__)

GIVE = "a .safetensors or .ckpt file, a diffusers folder or a hub name"


@dataclass(frozen=True)
class UnetParts:
    """The U-Net and the CLIP text encoders of a checkpoint."""

    unet: Component
    clips: tuple[MaybeComponent, ...]


@dataclass(frozen=True)
class UnetLoader:
    """The models of a checkpoint, each loaded on request, frozen, on the CPU."""

    path: Path  # the folder or file of the checkpoint
    parts: UnetParts
    vae_component: MaybeComponent
    latent_channels: int
    dtype: torch.dtype
    vae_dtype: torch.dtype
    uses_xformers: bool
    inpaints: bool

    @property
    def num_words(self) -> int | None:
        """The size of the vocabulary that all text encoders share; None if none is present."""
        sizes = [get_first_side(clip, CLIP_WORDS) for clip in self.parts.clips]
        # The smallest, so that no token ID lies beyond the embeddings of any encoder.
        return min((number for number in sizes if number is not None), default=None)

    def text_encoders(self) -> list[nn.Module]:
        return [load_clip(clip, self.dtype) for clip in self.parts.clips]

    def vae(self) -> nn.Module:
        return with_attention(load_vae(self.vae_component, self.vae_dtype), self.uses_xformers)

    def denoiser(self, weight_format: RequestedFormat | None = None) -> nn.Module:
        component = self.parts.unet
        unet = materialise(empty_unet(component.config), component.weights, self.dtype, weight_format)
        return with_attention(
            widen_for_inpainting(unet, self.latent_channels) if self.inpaints else unet, self.uses_xformers
        )


def open_unet_loader(
    options: TrainOptions, needs: VaeNeeds, encoders: Sequence[str], open_parts: Callable[[BaseFiles], UnetParts]
) -> UnetLoader:
    """Open the checkpoint that the options name; `encoders` are the folders of its text encoders in diffusers' layout.

    Raises UserError naming the flag if a file is missing, broken, incomplete or another kind of model.
    """
    vae, inpaints = options.model.vae, options.dataset.train_inpainting
    base = open_base(options.model, GIVE, ("unet", "vae", *encoders))
    if base.whole is None:
        warn_of_other_prediction(base.path, options.model.v_parameterization)
    parts = open_parts(base)
    check_unet_input(f"{base.flag} {base.path}", parts.unet, needs.channels, inpaints)
    return UnetLoader(
        path=base.path,
        parts=parts,
        vae_component=open_if_there(
            # A run whose latents are cached on disk may lack the VAE.
            options.caching.cache_latents_to_disk,
            lambda: vae_of_base(base) if vae is None else open_vae(vae, needs),
        ),
        latent_channels=needs.channels,
        dtype=DTYPES[options.precision.mixed_precision],
        vae_dtype=resolve_vae_dtype(options.model, options.precision.mixed_precision),
        uses_xformers=should_use_xformers(options.memory, options.diagnostics.deterministic),
        inpaints=inpaints,
    )


def should_use_xformers(memory: MemoryOptions, is_deterministic: bool) -> bool:
    """Return True if attention runs in xformers instead of torch's scaled dot product attention.

    Raises UserError if `is_deterministic` (--deterministic) excludes it.
    """
    # Both compute the same, so torch's also replaces a missing xformers, with a warning: front ends request xformers by
    # default.
    if memory.mem_eff_attn:
        logger.info("--mem_eff_attn: using torch's scaled dot product attention (sdpa), which needs as little memory")
        return False
    if memory.xformers:
        try:
            import_needed("xformers", "--xformers")
        except UserError as error:
            logger.warning(
                "%s; using torch's scaled dot product attention (sdpa), which computes the same in as little memory",
                error,
            )
            return False
    # torch's deterministic mode makes some versions of xformers choose other kernels, and others fail.
    if memory.xformers and is_deterministic:
        raise about("--deterministic", cause="does not fit", others=["--xformers"])(
            "excludes --xformers, whose backward pass adds in varying order",
            "leave --xformers out: torch's scaled dot product attention (sdpa) needs as little memory",
        )
    return memory.xformers


def with_attention(model: Any, uses_xformers: bool) -> nn.Module:
    """Set the attention of a diffusers model; the default is torch's scaled dot product attention."""
    if uses_xformers:
        model.enable_xformers_memory_efficient_attention()
    module: nn.Module = model
    return module
