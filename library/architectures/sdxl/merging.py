"""Stable Diffusion XL checkpoints for merging and extracting adapters."""

from functools import partial
from pathlib import Path

from torch import nn

from library.architectures.sdxl.layers import build_view, clip_module, unet_module
from library.architectures.sdxl.load import CLIP_G_PREFIX, CLIP_L_PREFIX, open_parts, recognise_unet_layout
from library.architectures.specs import list_specs
from library.checkpoints.base_files import open_files
from library.checkpoints.base_model import BaseModel
from library.models.base_checkpoint import CheckpointLayout, EncoderPlace, open_checkpoint
from library.models.clip.clip import empty_clip
from library.models.unet.unet import empty_unet

LAYOUT = CheckpointLayout(
    "sdxl",
    "stable-diffusion-xl-v1-base",
    unet_module,
    (
        EncoderPlace("text_encoder", CLIP_L_PREFIX, partial(clip_module, encoder=0)),
        EncoderPlace("text_encoder_2", CLIP_G_PREFIX, partial(clip_module, encoder=1)),
    ),
)


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file or a diffusers folder; only headers of its files are read.

    Raises UserError naming `flag` if it is broken or another kind of model.
    """
    return open_checkpoint(list_specs(), flag, path, LAYOUT)


def view_for_networks(path: Path) -> tuple[list[nn.Module], nn.Module]:
    """Return (both text encoders, U-Net) of a checkpoint as network modules see them, on the meta device."""
    parts = open_parts(open_files("the checkpoint", path))
    clip_l, clip_g = parts.clips
    encoders = [empty_clip(clip_l.config), empty_clip(clip_g.config, projects=True)]
    encoder_views, unet = build_view(recognise_unet_layout(parts.unet))(encoders, empty_unet(parts.unet.config))
    assert isinstance(encoder_views, list)
    return encoder_views, unet
