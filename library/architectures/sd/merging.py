"""Stable Diffusion 1.x and 2.x checkpoints for merging adapters into them and extracting adapters from them."""

from functools import partial
from pathlib import Path

from torch import nn

from library.architectures.sd.adapters import clip_module, unet_module, view
from library.architectures.sd.load import CLIP_PREFIXES, open_parts
from library.models.base_checkpoint import CheckpointLayout, EncoderPlace
from library.models.clip import empty_clip
from library.models.unet import empty_unet

ARCHITECTURES = {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-512"}
LAYOUTS = {
    base: CheckpointLayout(
        base,
        ARCHITECTURES[base],
        unet_module,
        (EncoderPlace("text_encoder", prefix, partial(clip_module, base=base)),),
    )
    for base, prefix in CLIP_PREFIXES.items()
}


def seen_by_networks(path: Path, base: str) -> tuple[list[nn.Module], nn.Module]:
    """(text encoder, U-Net) of a checkpoint as network modules see them, on the meta device."""
    parts = open_parts("the checkpoint", path, base, own_vae=False)
    encoder, unet = view([empty_clip(parts["text_encoder"].config)], empty_unet(parts["unet"].config))
    return [encoder], unet
