"""Tiny but complete Stable Diffusion 3 models."""

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.architectures.sd3.model import MMDiT, MMDiTConfig
from tests.tiny.init import fixed_init

FULL_SIZE = Path(__file__).parents[1] / "contracts" / "data" / "sd3.json.gz"

PLAIN = MMDiTConfig(
    width=64,
    depth=2,
    head_width=64,
    mlp_width=96,
    patch=2,
    in_channels=16,
    context_width=96,
    pooled_width=48,
    positions_side=24,
    norms_queries=False,
    dual_attention=frozenset(),
)
"""As SD3 medium is: heads 64 wide, no norms of queries."""

NORMED = MMDiTConfig(**{**vars(PLAIN), "head_width": 16, "norms_queries": True, "depth": 3})
"""As SD3.5 large is."""

DUAL = MMDiTConfig(**{**vars(NORMED), "dual_attention": frozenset({0, 1}), "positions_side": 32})
"""As SD3.5 medium is: the first blocks attend twice."""

CONFIGS = {"sd3-medium": PLAIN, "sd3.5-large": NORMED, "sd3.5-medium": DUAL}


def mmdit_weights(config: MMDiTConfig, seed: int) -> dict[str, Tensor]:
    """Weights of the denoiser under its own names; positions are of the size that cosines have."""
    with torch.device("meta"):
        model = MMDiT(config)
    weights = fixed_init(model, seed)
    shape = weights["pos_embed"].shape
    weights["pos_embed"] = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.7
    return weights


def tiny_mmdit(config: MMDiTConfig, seed: int) -> MMDiT:
    """A frozen denoiser in float32."""
    with torch.device("meta"):
        model = MMDiT(config)
    model.load_state_dict(mmdit_weights(config, seed), assign=True)
    return model.requires_grad_(False).eval()


def full_size_keys() -> dict[str, Any]:
    """Facts of the full-size models.

    "mmdit" {model: {name in the denoiser: shape}}; "parts" {vae, clip_l, clip_g, t5xxl: {name: shape}}; "lora" {model:
    {"default": {key: shape at rank 4}, "variants": {words: network_args, call, num_keys, added, removed, changed}}}.
    """
    facts: dict[str, Any] = json.loads(gzip.decompress(FULL_SIZE.read_bytes()))
    return facts
