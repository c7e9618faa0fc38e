"""A tiny but complete Stable Diffusion 1.x or 2.x model, as a diffusers folder or a single file."""

import gzip
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from library.architectures.sd.load import CLIP_PREFIXES
from library.models.unet.checkpoint_keys import UNET_PREFIX, UnetLayout, unet_to_ldm
from library.models.vae.checkpoint_keys import VAE_PREFIX, vae_to_ldm
from tests.tiny.init import fixed_init
from tests.tiny.open_clip import to_open_clip
from tests.tiny.parts import Parts
from tests.tiny.parts import write_folder as write_parts

Layout = Literal["diffusers", "safetensors", "ckpt"]
FULL_SIZE = Path(__file__).parents[1] / "contracts" / "data" / "sd15.json.gz"

UNET_LAYOUT = UnetLayout(layers_per_block=1, has_attention=(True, True, False))
UNET = {
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 16,
    "sample_size": 8,
}
VAE = {
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 64,
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
UNET_V2 = {**UNET, "attention_head_dim": 1, "use_linear_projection": True}  # diffusers means the number of heads
CLIP_V2 = {**CLIP, "hidden_act": "gelu"}
MERGES = ("c a", "ca t</w>", "d o", "do g</w>", "a n", "an d</w>", "r e", "re d</w>")
PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def build_tiny_sd(folder: Path, seed: int, layout: Layout = "diffusers", is_v2: bool = False) -> Path:
    """Write a tiny model into `folder` and return what --pretrained_model_name_or_path takes.

    Images of 64 px have 8x8 latents. A single file has its tokenizer/ next to it. Equal seeds give equal weights in
    every layout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(folder / "tokenizer", pad="!" if is_v2 else "<|endoftext|>")
    parts = tiny_parts(seed, vocab, is_v2)
    if layout == "diffusers":
        return write_folder(folder, parts)
    tensors = ldm_tensors({name: state for name, (_, state) in parts.items()}, is_v2)
    path = folder / f"tiny_sd.{layout}"
    if layout == "ckpt":
        torch.save({"state_dict": tensors, "global_step": 7}, path)
    else:
        from safetensors.torch import save_file

        save_file(tensors, path)
    return path


def tiny_parts(seed: int, vocab: int, is_v2: bool = False) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Return (config.json, weights) of unet, vae and text_encoder; the text encoder's names begin with
    "text_model."."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    ids = {"vocab_size": vocab, "bos_token_id": vocab - 2, "eos_token_id": vocab - 1, "pad_token_id": vocab - 1}
    unet_config, clip_config = (UNET_V2, CLIP_V2) if is_v2 else (UNET, CLIP)
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**unet_config), AutoencoderKL(**VAE)
        clip = CLIPTextModel(CLIPTextConfig(**clip_config, **ids))
    clip_state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in fixed_init(clip, seed + 2).items()}
    clip_json = {**clip_config, **ids, "architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    return {
        "unet": (json.loads(unet.to_json_string()), fixed_init(unet, seed)),
        "vae": (json.loads(vae.to_json_string()), fixed_init(vae, seed + 1)),
        "text_encoder": (clip_json, clip_state),
    }


def write_folder(folder: Path, parts: Parts) -> Path:
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    write_parts(folder, PIPELINE, parts)
    return folder


def ldm_tensors(states: dict[str, dict[str, Tensor]], is_v2: bool = False) -> dict[str, Tensor]:
    """Return the three state dicts in the single-file layout."""
    unet = {UNET_PREFIX + unet_to_ldm(name, UNET_LAYOUT): tensor for name, tensor in states["unet"].items()}
    text = to_open_clip(states["text_encoder"]) if is_v2 else states["text_encoder"]
    clip = {CLIP_PREFIXES["sd2" if is_v2 else "sd1"] + name: tensor for name, tensor in text.items()}
    return unet | clip | vae_tensors(states["vae"])


def vae_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the VAE in the single-file layout, where its attention is made of 1x1 convolutions."""
    vae = {}
    for name, tensor in state.items():
        is_projection = ".attentions." in name and tensor.ndim == 2
        key = VAE_PREFIX + vae_to_ldm(name, len(VAE["block_out_channels"]))  # type: ignore[arg-type]
        vae[key] = tensor[:, :, None, None] if is_projection else tensor
    return vae


def write_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> int:
    """Write CLIP's tokenizer with all bytes and a few words, so any caption encodes; return its vocabulary size."""
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = sorted(ByteLevel.alphabet())
    words = [*symbols, *(f"{s}</w>" for s in symbols), *(merge.replace(" ", "") for merge in MERGES)]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad
    config = {**special, "model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return len(vocab)


def full_size_keys() -> dict[str, Any]:
    """Return facts about the full-size model.

    "checkpoint" {name: shape}, "diffusers" {part: {module path: name in the file}}, "lora" {key: shape at rank 4}.
    """
    facts: dict[str, Any] = json.loads(gzip.decompress(FULL_SIZE.read_bytes()))
    return facts
