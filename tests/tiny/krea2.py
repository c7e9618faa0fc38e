"""A tiny but complete Krea 2 model: three files, one file of all, or a diffusers folder."""

import json
from pathlib import Path
from typing import Any, Literal

import torch

from library.architectures.krea2.model import AttentionConfig, Krea2Config, SingleStreamDiT
from library.architectures.krea2.reference import diffusers_config, diffusers_state
from tests.tiny.anima import VAE, to_original, vae_state
from tests.tiny.parts import BASE, Parts, prefixed, tiny_denoiser, write_files, write_folder, write_whole
from tests.tiny.qwen3_vl import tiny_qwen3_vl
from tests.tiny.zimage import write_qwen3_tokenizer

Layout = Literal["files", "whole", "diffusers"]

CONFIG = Krea2Config(
    in_features=64,
    time_features=256,
    num_states=12,
    block=AttentionConfig(width=64, head_width=16, num_kv_heads=2, mlp_width=96),
    fusion=AttentionConfig(width=16, head_width=8, num_kv_heads=2, mlp_width=24),
    num_layerwise=2,
    num_refiners=2,
    num_blocks=2,
)
FULL_SIZE = Krea2Config(
    in_features=64,
    time_features=256,
    num_states=12,
    block=AttentionConfig(width=6144, head_width=128, num_kv_heads=12, mlp_width=16384),
    fusion=AttentionConfig(width=2560, head_width=128, num_kv_heads=20, mlp_width=6912),
    num_layerwise=2,
    num_refiners=2,
    num_blocks=28,
)
QWEN3_VL = {
    "hidden_size": CONFIG.fusion.width,
    "intermediate_size": 24,
    "num_hidden_layers": 36,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [2, 1, 1]},
}
PREFIX = "model."  # of the text encoder's file, which also contains its vision model


def build_tiny_krea2(
    folder: Path, seed: int, layout: Layout = "files", flag: str = BASE, name: str = "raw"
) -> list[str]:
    """Write a tiny model into `folder` and return the options that select it, with the base model as `flag` and its
    transformer called `name`. Equal seeds give equal weights in every layout."""
    parts = tiny_parts(seed, write_qwen3_tokenizer(folder / "tokenizer"))
    if layout == "diffusers":
        index = {"_class_name": "Krea2Pipeline", "is_distilled": False}
        return write_folder(folder, index, parts, diffusers_state, flag)
    denoiser, encoder = parts["transformer"][1], parts["text_encoder"][1]
    vae = {to_original(key): tensor for key, tensor in parts["vae"][1].items()}
    if layout == "whole":
        language = {key.removeprefix("language_"): tensor for key, tensor in encoder.items()}
        text = prefixed("text_encoders.qwen3vl_4b.transformer.", language)
        return write_whole(folder, flag, "krea2", denoiser, vae, text)
    files = {"--vae": ("qwen_image_vae", vae), "--text_encoder": ("qwen3vl_4b", prefixed(PREFIX, encoder))}
    return write_files(folder, {flag: (name, denoiser), **files})


def tiny_parts(seed: int, num_words: int) -> Parts:
    """Return (config.json, weights) by diffusers' folder name; the denoiser has our names, the VAE diffusers'."""
    encoder = tiny_qwen3_vl(seed + 2, num_words, **QWEN3_VL)
    return {
        "transformer": (diffusers_config(CONFIG), tiny_krea2(seed).state_dict()),
        "vae": ({**VAE, "_class_name": "AutoencoderKLQwenImage"}, vae_state(seed + 1)),
        "text_encoder": (json.loads(encoder.config.to_json_string()), encoder.state_dict()),
    }


def full_size_qwen3_vl() -> Any:
    """Return the language model of Qwen3-VL 4B on the meta device."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

    sizes = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    with torch.device("meta"):
        return Qwen3VLTextModel(Qwen3VLTextConfig(**sizes, num_key_value_heads=8, head_dim=128))


def full_size_vae() -> Any:
    """Return Qwen-Image's VAE on the meta device."""
    from diffusers import AutoencoderKLQwenImage

    with torch.device("meta"):
        return AutoencoderKLQwenImage()


def tiny_krea2(seed: int) -> SingleStreamDiT:
    """Return the denoiser alone, with random weights."""
    return tiny_denoiser(SingleStreamDiT, CONFIG, seed)
