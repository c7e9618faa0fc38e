"""Tiny models whose U-Net also receives a mask and the masked image."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.models.unet.checkpoint_keys import UNET_PREFIX

NUM_MORE = 5  # channels: the mask, and four of the masked image's latents


def widened(weight: Tensor, seed: int) -> Tensor:
    """Return the first layer's weight with NUM_MORE additional input channels of the same scale."""
    shape = len(weight), NUM_MORE, *weight.shape[2:]
    return torch.cat([weight, torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * weight.std()], 1)


def widen_folder(plain: Path, target: Path, seed: int) -> Path:
    """Write a copy of a diffusers folder as an inpainting model."""
    shutil.copytree(plain, target)
    config = json.loads((target / "unet" / "config.json").read_text())
    (target / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 4 + NUM_MORE}))
    (path,) = (target / "unet").glob("*.safetensors")
    weights = load_file(path)
    save_file({**weights, "conv_in.weight": widened(weights["conv_in.weight"], seed)}, path)
    return target


def widen_file(plain: Path, target: Path, seed: int) -> Path:
    """Write a copy of a single file, and of the tokenizer next to it, as an inpainting model."""
    target.mkdir()
    shutil.copytree(plain.parent / "tokenizer", target / "tokenizer")
    weights, name = load_file(plain), f"{UNET_PREFIX}input_blocks.0.0.weight"
    save_file({**weights, name: widened(weights[name], seed)}, target / plain.name)
    return target / plain.name
