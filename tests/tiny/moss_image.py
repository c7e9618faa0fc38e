"""A tiny but complete MOSS-Image model: three files, one file of all, or a diffusers folder."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from library.architectures.moss_image.layers import FUSED, PARTS, linear_paths
from library.architectures.moss_image.model import MossImage, MossImageConfig
from library.architectures.moss_image.qwen3_5 import ENCODER
from library.models.adapter_views import view_denoiser
from library.models.loading import build_on_meta_device
from library.models.qwen3_vl_vision import NUM_HEADS
from tests.tiny.base import Base, Deep
from tests.tiny.flux_2 import full_size_vae, original_vae, tiny_vae
from tests.tiny.headers import write_headers
from tests.tiny.init import fixed_init
from tests.tiny.keys import kohya, lora_of, peft
from tests.tiny.parts import BASE, Parts, prefixed, tiny_denoiser, write_files, write_folder, write_whole
from tests.tiny.zimage import write_qwen3_tokenizer

Layout = Literal["files", "whole", "diffusers"]

CONFIG = MossImageConfig(
    in_features=128,
    width=48,
    head_width=16,
    mlp_width=80,
    text_width=32,
    level_features=64,
    num_text_blocks=2,
    num_layers=3,
)
FULL_SIZE = MossImageConfig(
    in_features=128,
    width=3072,
    head_width=128,
    mlp_width=8192,
    text_width=4096,
    level_features=256,
    num_text_blocks=2,
    num_layers=42,
)
TEXT = {
    "hidden_size": CONFIG.text_width,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000.0,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [1, 1, 0],
    },
}
VISION = {
    "depth": 2,
    "hidden_size": 4 * NUM_HEADS,
    "intermediate_size": 32,
    "num_heads": NUM_HEADS,
    "num_position_embeddings": 16,
    "out_hidden_size": CONFIG.text_width,
}
SPECIAL = ("<|endoftext|>", *ENCODER.marks, "<|video_pad|>")


def build_tiny_moss_image(folder: Path, seed: int, layout: Layout = "files", flag: str = BASE) -> list[str]:
    """Write a tiny model into `folder` and return the options that select it, with the base model as `flag`. Equal
    seeds give equal weights in every layout; one file of all fuses q, k and v, as ComfyUI's model does."""
    parts = tiny_parts(seed, write_qwen3_tokenizer(folder / "tokenizer", SPECIAL))
    if layout == "diffusers":
        return write_folder(folder, {"_class_name": "MOSSImagePipeline"}, parts, flag=flag)
    denoiser = {**parts["transformer"][1], "rope.bands": torch.ones(2)}
    encoder, vae = parts["text_encoder"][1], original_vae(parts["vae"][1])
    if layout == "whole":
        text = prefixed("text_encoders.qwen35_9b.transformer.", encoder)
        return write_whole(folder, flag, "moss_image", with_fused_qkv(denoiser), vae, text)
    files = {"--vae": ("flux2-vae", vae), "--text_encoder": ("qwen3.5_9b_bf16", encoder)}
    return write_files(folder, {flag: ("moss_image_base_bf16", denoiser), **files})


def tiny_parts(seed: int, num_words: int) -> Parts:
    """Return (config.json, weights) by diffusers' folder name."""
    encoder = tiny_text_encoder(seed + 2, num_words)
    return {
        "transformer": ({"dim": CONFIG.width, "num_layers": CONFIG.num_layers}, tiny_moss_image(seed).state_dict()),
        "vae": tiny_vae(seed + 1),
        "text_encoder": (json.loads(encoder.config.to_json_string()), dict(encoder.state_dict())),
    }


def tiny_text_encoder(seed: int, num_words: int) -> Any:
    """Return transformers' Qwen3_5Model, whose image tokens are those of the tiny tokenizer."""
    from transformers import Qwen3_5Config, Qwen3_5Model

    first = num_words - len(SPECIAL)
    ids = {
        "image": "<|image_pad|>",
        "video": "<|video_pad|>",
        "vision_start": ENCODER.marks[3],
        "vision_end": ENCODER.marks[4],
    }
    config = Qwen3_5Config(
        text_config={**TEXT, "vocab_size": num_words},
        vision_config=VISION,
        **{f"{name}_token_id": first + SPECIAL.index(mark) for name, mark in ids.items()},
    )
    model = Qwen3_5Model(config).eval().requires_grad_(False)
    model.load_state_dict(fixed_init(model, seed))
    return model


def with_fused_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the denoiser's weights with q, k and v fused in one layer, as in ComfyUI's model."""
    fused = {name: tensor for name, tensor in state.items() if not re.search(r"^layers.*\.proj\.[qkv]\.", name)}
    for name in state:
        if name.startswith("layers.") and f".{PARTS[0]}." in name:
            parts = [state[name.replace(PARTS[0], part)] for part in PARTS]
            fused[name.replace(PARTS[0], FUSED)] = torch.cat(parts)
    return fused


def tiny_moss_image(seed: int) -> MossImage:
    """Return the denoiser alone, with random weights."""
    return tiny_denoiser(MossImage, CONFIG, seed)


LENGTHS = (11, 4)


def inputs(h: int, w: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return latents, noise levels, text, and its mask."""
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(2, CONFIG.in_features, h, w, generator=g)
    text = torch.randn(2, LENGTHS[0], CONFIG.text_width, generator=g)
    mask = torch.arange(LENGTHS[0])[None] < torch.tensor(LENGTHS)[:, None]
    return latents, torch.tensor([0.1234, 0.875]), text, mask.long()


def full_size() -> MossImage:
    return build_on_meta_device(MossImage, FULL_SIZE)


def write_full_size(folder: Path) -> list[str]:
    from transformers import Qwen3_5Config, Qwen3_5Model

    write_qwen3_tokenizer(folder / "tokenizer", SPECIAL)
    with torch.device("meta"):
        encoder = Qwen3_5Model(Qwen3_5Config(vision_config={"out_hidden_size": FULL_SIZE.text_width}))
    files = {"pretrained_model_name_or_path": full_size(), "text_encoder": encoder, "vae": full_size_vae()}
    return write_headers(folder, files)


BASES = (
    Base(
        name="moss_image",
        script="moss_image_train_network",
        module="networks.lora",
        build=lambda folder: build_tiny_moss_image(folder, 64),
        written=("moss_image", "MOSS-Image"),
        deeper={"num_layers": 6},
        needs_newer="transformers 4.54.1",
        offset_words=("--timestep_sampling", "sigmoid", "--sigmoid_scale", "0.7"),
        deep=Deep(lambda: MossImage(replace(CONFIG, num_layers=6)), lambda: inputs(4, 6), view_denoiser, most_graphs=2),
        merged=("networks.lora", {"in_dims": "[2,2,2,2,2,2]"}),
        full_size={"MOSS-Image": (1024, write_full_size)},
        readers=(
            ("moss-image, as it is saved", "ANNNN", peft("diffusion_model.layers.0.proj.q", 3072)),
            ("moss-image, feed-forward", "ANNNN", peft("diffusion_model.layers.41.proj.ffn_down", 8192)),
            ("moss-image, fused", "ANNNN", peft("diffusion_model.layers.0.proj.qkv", 3072)),
            ("moss-image, below transformer", "NNNNN", peft("transformer.layers.0.proj.q", 3072)),
            ("moss-image kohya", "NNNNN", kohya("unet.layers.0.proj.q", 3072)),
        ),
        listing=lambda: lora_of(full_size(), linear_paths()),
    ),
)
