"""A tiny but complete FLUX.1 model: the four files of the original release, one file of all, or a diffusers folder."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from library.architectures.flux.layers import NAMES, view
from library.architectures.flux.model import PATCH, Flux, FluxConfig
from library.architectures.flux.reference import diffusers_config, diffusers_model, diffusers_state
from library.models.patches import patchify
from library.models.vae.checkpoint_keys import vae_to_ldm
from tests.contracts.full_size import facts
from tests.tiny.base import TEXT_CACHE, Base, Compared, Deep, InDiffusers, Pair
from tests.tiny.headers import shapes_of, write_headers
from tests.tiny.init import fixed_init
from tests.tiny.keys import kohya, peft
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
            folder, {"_class_name": "FluxPipeline"}, parts, lambda state: diffusers_state(state, CONFIG)
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


# Its inputs, and the output of diffusers' transformer

NUM_TEXT = 7


def inputs(H: int, W: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return latents, noise levels, text, pooled text, guidance."""
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 16, H, W, generator=g).requires_grad_()
    text = torch.randn(2, NUM_TEXT, CONFIG.text_width, generator=g).requires_grad_()
    pooled = torch.randn(2, CONFIG.pooled_width, generator=g).requires_grad_()
    return latents, torch.tensor([0.125, 0.875]), text, pooled, torch.tensor([1.0, 3.5])


def oracle_output(
    theirs: Any, latents: Tensor, sigmas: Tensor, text: Tensor, pooled: Tensor, guidance: Tensor | None
) -> Tensor:
    """Return diffusers' velocity as patches, with the image ids of its pipeline."""
    from diffusers import FluxPipeline

    h, w = latents.shape[-2] // 2, latents.shape[-1] // 2
    B, C, H, W = latents.shape
    packed = FluxPipeline._pack_latents(latents, B, C, H, W)
    return theirs(  # type: ignore[no-any-return]
        packed,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=sigmas,
        guidance=guidance,
        img_ids=FluxPipeline._prepare_latent_image_ids(B, h, w, latents.device, torch.float32),
        txt_ids=torch.zeros(text.shape[1], 3, device=text.device),
    ).sample


def write_full_size(folder: Path) -> list[str]:
    parts = facts("flux1")["components"]
    write_tokenizer(folder / "tokenizer")
    write_t5_tokenizer(folder / "tokenizer_2")
    names = {"pretrained_model_name_or_path": "dit", "clip_l": "clip_l", "t5xxl": "t5xxl", "ae": "ae"}
    return write_headers(folder, {flag: shapes_of(parts[part]) for flag, part in names.items()})


def diffusers_models() -> dict[str, nn.Module]:
    from diffusers import FluxTransformer2DModel

    return {"transformer": FluxTransformer2DModel(guidance_embeds=True)}


def pair() -> Pair:
    ours, values = tiny_flux(7), [value.detach() for value in inputs(6, 10)]
    theirs = diffusers_model(ours)
    return Pair(
        NAMES,
        ours,
        {"transformer": theirs},
        lambda: patchify(ours(*values), PATCH),
        lambda: oracle_output(theirs, *values),
    )


def run(model: Flux, *values: Any) -> Tensor:
    return patchify(model(*values), PATCH)


def unguided(H: int, W: int) -> tuple[Tensor | None, ...]:
    return (*inputs(H, W)[:4], None)


SIZES = ((8, 8), (4, 14), (18, 6))  # of the latent
DEEPER = {"num_double": 4, "num_single": 6}
PAGE = [
    "--network_args", "img_attn_dim=4", "txt_attn_dim=4", "img_mlp_dim=2", "txt_mlp_dim=2", "img_mod_dim=2",
    "txt_mod_dim=2", "single_dim=4", "single_mod_dim=2", "in_dims=2,2,2,2,2", "train_t5xxl=True",
    "train_double_block_indices=0", "train_single_block_indices=0-1", "split_qkv=True",
]  # fmt: skip
BASES = (
    Base(
        name="flux",
        script="flux_train_network",
        module="networks.lora_flux",
        build=lambda folder: [*build_tiny_flux(folder, 54), "--t5xxl_max_token_length", "32"],
        adapts_text_encoders=True,
        everything={"split_qkv": "True", "in_dims": "[2,2,2,2,2]"},
        written=("flux1", "flux-1-dev"),
        runs={"text_cache": TEXT_CACHE, "page": PAGE, "page_train_blocks": ["--network_args", "train_blocks=single"]},
        deeper=DEEPER,
        draws_without_guidance=True,
        offset_words=("--timestep_sampling", "flux_shift", "--sigmoid_scale", "0.7"),
        compared={
            "flux dev": Compared(
                partial(tiny_flux, 1), diffusers_model, {str(s): partial(inputs, *s) for s in SIZES}, oracle_output, run
            ),
            "flux schnell": Compared(
                partial(tiny_flux, 1, has_guidance=False),
                diffusers_model,
                {str(size): partial(unguided, *size) for size in SIZES},
                oracle_output,
                run,
            ),
        },
        deep=Deep(
            lambda: Flux(replace(CONFIG, **DEEPER)),
            lambda: tuple(value.detach() for value in inputs(8, 6, seed=43)),
            view,
            most_graphs=4,
        ),
        pairs={"flux": pair},
        verified={
            "flux": lambda: tiny_denoiser(Flux, replace(CONFIG, num_double=3, num_single=4), 61),
            "flux schnell": lambda: tiny_flux(63, has_guidance=False),
        },
        merged=("networks.oft_v2", {}),
        full_size={"FLUX.1": (1024, write_full_size)},
        readers=(
            ("flux kohya", "AANAA", kohya("unet.double_blocks.0.img_attn_qkv", 3072)),
            ("flux generic", "AANNA", peft("diffusion_model.double_blocks.0.img_attn.qkv", 3072)),
            ("flux diffusers", "AANAA", peft("transformer.single_transformer_blocks.0.attn.to_q", 3072)),
        ),
        in_layouts=build_tiny_flux,
        listing=lambda: facts("lora_keys_flux1"),
        in_diffusers=InDiffusers(
            diffusers_models,
            "FluxLoraLoaderMixin",
            (
                "default",
                "in_dims=[5,6,7,8,9]",
                "train_t5xxl=True",
                "train_blocks=single",
                "network_train_text_encoder_only",
            ),
            clip_widths=(768,),
        ),
        in_comfyui="in_dims=[5,6,7,8,9]",
    ),
)
