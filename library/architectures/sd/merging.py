"""Stable Diffusion 1.x and 2.x checkpoints for merging and extracting adapters."""

from functools import partial
from pathlib import Path

from torch import nn

from library.architectures.sd.layers import clip_module, unet_module, view
from library.architectures.sd.load import CLIP_PREFIXES, open_parts
from library.architectures.specs import list_specs
from library.checkpoints.base_files import open_files
from library.checkpoints.base_model import BaseModel
from library.models.base_checkpoint import CheckpointLayout, EncoderPlace, open_checkpoint
from library.models.clip.clip import empty_clip
from library.models.unet.unet import empty_unet

ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-512"}
LAYOUTS = {
    base: CheckpointLayout(
        base, ARCHITECTURES[base], unet_module, (EncoderPlace("text_encoder", prefix, partial(clip_module, base=base)),)
    )
    for base, prefix in CLIP_PREFIXES.items()
}


def open_base_model(base: str, flag: str, path: Path) -> BaseModel:
    """Open a single file or a diffusers folder of "sd1" or "sd2"; only headers of its files are read.

    Raises UserError naming `flag` if it is broken or another kind of model.
    """
    return open_checkpoint(list_specs(), flag, path, LAYOUTS[base])


def view_for_networks(base: str, path: Path) -> tuple[list[nn.Module], nn.Module]:
    """Return ([text encoder], U-Net) of a checkpoint as network modules see them, on the meta device."""
    parts = open_parts(open_files("the checkpoint", path), base)
    encoder, unet = view([empty_clip(parts["text_encoder"].config)], empty_unet(parts["unet"].config))
    return encoder if isinstance(encoder, list) else [encoder], unet
