"""A tiny but complete Stable Diffusion XL model, as a diffusers folder or a single file."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from library.architectures.sdxl.layers import unet_module, unet_view
from library.architectures.sdxl.load import CLIP_G_PREFIX, CLIP_L_PREFIX
from library.checkpoints.adapter_names import BaseNames
from library.models.unet.checkpoint_keys import UNET_PREFIX, UnetLayout, unet_to_ldm
from tests.contracts.full_size import facts
from tests.tiny.base import TEXT_CACHE, Base, Pair, layers_of, path_argument
from tests.tiny.headers import shapes_of, write_headers
from tests.tiny.init import fixed_init
from tests.tiny.keys import kohya
from tests.tiny.open_clip import to_open_clip
from tests.tiny.parts import Parts
from tests.tiny.parts import write_folder as write_parts
from tests.tiny.sd import CLIP, CONVOLUTIONS, SCHEDULER, VAE, unets, vae_tensors, write_tokenizer

Layout = Literal["diffusers", "safetensors"]

UNET_LAYOUT = UnetLayout(layers_per_block=2, has_attention=(False, True, True))
WIDTH1, WIDTH2 = 32, 48  # of the text encoders
UNET = {
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "cross_attention_dim": WIDTH1 + WIDTH2,
    "attention_head_dim": 1,  # diffusers means the number of heads
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": WIDTH2 + 6 * 8,
    "norm_num_groups": 16,
    "sample_size": 8,
}
CLIP_G = {
    **CLIP,
    "hidden_size": WIDTH2,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "projection_dim": WIDTH2,
    "hidden_act": "gelu",
}
PIPELINE = {
    "_class_name": "StableDiffusionXLPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
}


def build_tiny_sdxl(folder: Path, seed: int, layout: Layout = "diffusers") -> Path:
    """Write a tiny model into `folder` and return what --pretrained_model_name_or_path takes.

    Images of 64 px have 8x8 latents. A single file has its tokenizer/ next to it. Equal seeds give equal weights in
    every layout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(folder / "tokenizer")
    parts = tiny_parts(seed, vocab)
    if layout == "diffusers":
        write_tokenizer(folder / "tokenizer_2", pad="!")
        return write_folder(folder, parts)
    from safetensors.torch import save_file

    path = folder / "tiny_sdxl.safetensors"
    save_file(ldm_tensors({name: state for name, (_, state) in parts.items()}), path)
    return path


def tiny_parts(seed: int, vocab: int) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Return (config.json, weights) of unet, vae and both text encoders; the text encoders' names begin with
    "text_model."."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    ids = {"vocab_size": vocab, "bos_token_id": vocab - 2, "eos_token_id": vocab - 1, "pad_token_id": vocab - 1}
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE, scaling_factor=0.13025)
        clip_l = CLIPTextModel(CLIPTextConfig(**CLIP, **ids))
        clip_g = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G, **ids))
    first = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in fixed_init(clip_l, seed + 2).items()}
    config1 = {**CLIP, **ids, "architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    config2 = {**CLIP_G, **ids, "architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model"}
    return {
        "unet": (json.loads(unet.to_json_string()), fixed_init(unet, seed)),
        "vae": (json.loads(vae.to_json_string()), fixed_init(vae, seed + 1)),
        "text_encoder": (config1, first),
        "text_encoder_2": (config2, fixed_init(clip_g, seed + 3)),
    }


def write_folder(folder: Path, parts: Parts) -> Path:
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    write_parts(folder, PIPELINE, parts)
    return folder


def ldm_tensors(states: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the four state dicts in the single-file layout."""
    unet = {UNET_PREFIX + unet_to_ldm(name, UNET_LAYOUT): tensor for name, tensor in states["unet"].items()}
    clip_l = {CLIP_L_PREFIX + name: tensor for name, tensor in states["text_encoder"].items()}
    clip_g = {CLIP_G_PREFIX + name: tensor for name, tensor in to_open_clip(states["text_encoder_2"]).items()}
    return unet | clip_l | clip_g | vae_tensors(states["vae"])


def write_full_size(folder: Path) -> list[str]:
    write_tokenizer(folder / "tokenizer")
    return write_headers(folder, {"pretrained_model_name_or_path": shapes_of(facts("sdxl")["checkpoint"])})


def pair() -> Pair:
    """Build a U-Net pair; both models are diffusers', with names derived for the tiny layout as for the full size."""
    ours, theirs = unets(UNET)
    generator = torch.Generator().manual_seed(8)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 9, WIDTH1 + WIDTH2, generator=generator)
    pooled, sizes = torch.randn(2, WIDTH2, generator=generator), torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    names = BaseNames("sdxl", tuple(unet_module(path, UNET_LAYOUT) for path, _ in layers_of(ours)))
    runs = [
        lambda model=model: model(latents, torch.tensor([31, 742]), text, **more).sample for model in (ours, theirs)
    ]
    return Pair(names, unet_view(ours, UNET_LAYOUT), {"unet": theirs}, *runs)


BASES = (
    Base(
        name="sdxl",
        script="sdxl_train_network",
        module="networks.lora",
        build=lambda folder: path_argument(build_tiny_sdxl(folder, 53)),
        adapts_text_encoders=True,
        unused="lora_te1_text_model_encoder_layers_1_",
        everything={"conv_dim": "4"},
        written=("sdxl_base_v1-0", "stable-diffusion-xl-v1-base"),
        runs={"convolutions": ["--network_args", *CONVOLUTIONS], "text_cache": TEXT_CACHE},
        blocks_to_swap="9",
        pairs={"sdxl": pair},
        count_share=0.05,  # buffers inside convolutions are 4 % of so small a model, and less than 0.4 % at full size
        count_shape=(4, 384, 256),  # with large images small tensors count less
        merged=("networks.lokr", {"factor": "2", "conv_dim": "2"}),
        full_size={"SDXL": (1024, write_full_size)},
        readers=(("sdxl kohya", "AAAAA", kohya("unet.input_blocks.4.1.transformer_blocks.0.attn2.to_k", 2048)),),
    ),
)
