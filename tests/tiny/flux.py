"""A tiny but complete FLUX.1 model: the four files of the original release, one file of all, or a diffusers folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from library.architectures.flux.model import Flux, FluxConfig
from library.architectures.flux.reference import diffusers_config, diffusers_state
from library.models.vae.checkpoint_keys import vae_to_ldm
from tests.tiny.init import fixed_init
from tests.tiny.parts import BASE, Parts, prefixed, tiny_denoiser, write_files, write_folder, write_whole
from tests.tiny.sd import CLIP, write_tokenizer
from tests.tiny.sd import VAE as SD_VAE

Layout = Literal["files", "whole", "diffusers"]

CONFIG = FluxConfig(
    in_features=64,
    width=64,
    head_width=32,
    mlp_width=256,
    text_width=32,
    pooled_width=32,
    num_double=2,
    num_single=2,
    has_guidance=True,
)
VAE = {
    **SD_VAE,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 8,
}
T5_WORDS = (
    "a",
    "c",
    "t",
    "d",
    "o",
    "g",
    "r",
    "e",
    "cat",
    "dog",
    "red",
    "\u2581cat",
    "\u2581dog",
    "\u2581red",
    "\u2581a",
)


def build_tiny_flux(folder: Path, seed: int, layout: Layout = "files", has_guidance: bool = True) -> list[str]:
    """Write a tiny model into `folder` and return the options that select it. Equal seeds give equal weights in
    every layout, but single files use the exact GELU in CLIP."""
    num_clip_words = write_tokenizer(folder / "tokenizer")
    num_t5_words = write_t5_tokenizer(folder / "tokenizer_2")
    parts = tiny_parts(seed, num_clip_words, num_t5_words, has_guidance)
    if layout == "diffusers":
        return write_folder(
            folder, {"_class_name": "FluxPipeline"}, parts, lambda state: diffusers_state(state, CONFIG.width)
        )
    flux, vae = parts["transformer"][1], ldm_vae(parts["vae"][1])
    clip, t5 = parts["text_encoder"][1], parts["text_encoder_2"][1]
    if layout == "whole":
        text = prefixed("text_encoders.clip_l.transformer.", clip) | prefixed("text_encoders.t5xxl.transformer.", t5)
        return write_whole(folder, BASE, "flux_all_in_one", flux, vae, text)
    files = {"--ae": ("ae", vae), "--clip_l": ("clip_l", clip), "--t5xxl": ("t5xxl", t5)}
    return write_files(folder, {BASE: ("flux1", flux), **files})


def tiny_parts(seed: int, num_clip_words: int, num_t5_words: int, has_guidance: bool) -> Parts:
    """Return (config.json, weights) by diffusers' folder name; the denoiser has our names, CLIP's begin with
    "text_model."."""
    from transformers import CLIPTextConfig, CLIPTextModel

    ids = {"bos_token_id": num_clip_words - 2, "eos_token_id": num_clip_words - 1, "pad_token_id": num_clip_words - 1}
    clip_config = {**CLIP, **ids, "vocab_size": num_clip_words, "hidden_act": "gelu"}
    flux = tiny_flux(seed, has_guidance)
    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig(**clip_config))
    clip_state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in fixed_init(clip, seed + 2).items()}
    return {
        "transformer": (diffusers_config(flux.config), flux.state_dict()),
        "vae": tiny_vae(seed + 1),
        "text_encoder": ({**clip_config, "architectures": ["CLIPTextModel"]}, clip_state),
        "text_encoder_2": tiny_t5(seed + 3, num_t5_words),
    }


def tiny_vae(seed: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (config.json, weights)."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(**VAE)
    return json.loads(vae.to_json_string()), fixed_init(vae, seed)


def tiny_t5(seed: int, num_words: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (config.json, weights)."""
    from transformers import T5Config, T5EncoderModel

    config = {**T5, "vocab_size": num_words}
    with torch.device("meta"):
        t5 = T5EncoderModel(T5Config(**config))
    state = {k: v for k, v in fixed_init(t5, seed).items() if k != "encoder.embed_tokens.weight"}
    return {**config, "architectures": ["T5EncoderModel"]}, state


def ldm_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the VAE in the layout of ae.safetensors, where attention is made of 1x1 convolutions."""
    converted = {}
    for name, tensor in state.items():
        is_projection = ".attentions." in name and tensor.ndim == 2
        converted[vae_to_ldm(name, len(VAE["block_out_channels"]))] = (
            tensor[:, :, None, None] if is_projection else tensor
        )
    return converted


def write_t5_tokenizer(folder: Path) -> int:
    """Write T5's tokenizer with a few letters and words; return its vocabulary size."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("\u2581", -3.0)]
    pieces += [(word, -2.0 - 1 / len(word)) for word in T5_WORDS]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0)
    tokenizer.save_pretrained(str(folder))
    return len(tokenizer.get_vocab())


def tiny_flux(seed: int, has_guidance: bool = True) -> Flux:
    """Return the denoiser alone, with random weights."""
    return tiny_denoiser(Flux, replace(CONFIG, has_guidance=has_guidance), seed)
