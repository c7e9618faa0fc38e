"""A tiny but complete Chroma model, the relative of FLUX.1: three files, one file of all, or a diffusers folder."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.flux.approximator import ApproximatorConfig
from library.architectures.flux.layers import CHROMA_NAMES
from library.architectures.flux.model import PATCH, Flux, FluxConfig
from library.architectures.flux.predict import with_first_padding
from library.architectures.flux.reference import diffusers_config, diffusers_model, diffusers_state
from library.models.patches import patchify
from tests.contracts.full_size import facts
from tests.tiny import flux
from tests.tiny.base import TEXT_CACHE, Base, Compared, InDiffusers, Pair
from tests.tiny.flux import Layout, ldm_vae, tiny_t5, tiny_vae, write_t5_tokenizer
from tests.tiny.headers import shapes_of, write_headers
from tests.tiny.keys import kohya, peft
from tests.tiny.parts import BASE, Parts, prefixed, tiny_denoiser, write_files, write_folder, write_whole

CONFIG = replace(flux.CONFIG, pooled_width=0, approximator=ApproximatorConfig(in_features=16, hidden_width=48, depth=2))


def build_tiny_chroma(folder: Path, seed: int, layout: Layout = "files") -> list[str]:
    """Write a tiny model into `folder` and return the options that select it. Equal seeds give equal weights in
    every layout."""
    num_words = write_t5_tokenizer(folder / ("tokenizer" if layout == "diffusers" else "tokenizer_2"))
    model = tiny_chroma(seed)
    parts: Parts = {
        "transformer": (diffusers_config(model.config), model.state_dict()),
        "vae": tiny_vae(seed + 1),
        "text_encoder": tiny_t5(seed + 3, num_words),
    }
    kind = ["--model_type", "chroma"]
    if layout == "diffusers":
        return [
            *write_folder(
                folder, {"_class_name": "ChromaPipeline"}, parts, lambda state: diffusers_state(state, CONFIG)
            ),
            *kind,
        ]
    chroma, vae, t5 = parts["transformer"][1], ldm_vae(parts["vae"][1]), parts["text_encoder"][1]
    if layout == "whole":
        text = prefixed("text_encoders.t5xxl.transformer.", t5)
        return [*write_whole(folder, BASE, "chroma", chroma, vae, text), *kind]
    files = {BASE: ("chroma", chroma), "--ae": ("ae", vae), "--t5xxl": ("t5xxl", t5)}
    return [*write_files(folder, files), *kind]


def tiny_chroma(seed: int, config: FluxConfig | None = None) -> Flux:
    """Return the denoiser alone, with random weights."""
    return tiny_denoiser(Flux, config or CONFIG, seed)


# Its inputs, and the output of diffusers' transformer

NUM_TEXT = 9


def inputs(H: int, W: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, noise levels, text."""
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 16, H, W, generator=g).requires_grad_()
    text = torch.randn(2, NUM_TEXT, CONFIG.text_width, generator=g).requires_grad_()
    return latents, torch.tensor([0.1875, 0.8125]), text


def velocity(model: Flux, latents: Tensor, sigmas: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return our velocity as patches, with the guidance that diffusers assumes."""
    return patchify(model(latents, sigmas, text, None, torch.zeros_like(sigmas), mask), PATCH)


def oracle_output(theirs: Any, latents: Tensor, sigmas: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return diffusers' velocity as patches, with the positions and mask of its pipeline."""
    from diffusers import ChromaPipeline

    B, C, H, W = latents.shape
    packed = ChromaPipeline._pack_latents(latents, B, C, H, W)
    place = (B, H // 2, W // 2, latents.device, torch.float32)
    return theirs(  # type: ignore[no-any-return]
        packed,
        encoder_hidden_states=text,
        timestep=sigmas,
        img_ids=ChromaPipeline._prepare_latent_image_ids(*place),
        txt_ids=torch.zeros(text.shape[1], 3),
        attention_mask=ChromaPipeline._prepare_attention_mask(None, B, packed.shape[1], torch.bool, mask),  # type: ignore[arg-type]
    ).sample


def write_full_size(folder: Path) -> list[str]:
    parts = {**facts("flux1")["components"], **facts("chroma")["components"]}
    write_t5_tokenizer(folder / "tokenizer_2")
    names = {"pretrained_model_name_or_path": "dit", "t5xxl": "t5xxl", "ae": "ae"}
    files = {flag: shapes_of(parts[part]) for flag, part in names.items()}
    return [*write_headers(folder, files), "--model_type", "chroma"]


def diffusers_models() -> dict[str, nn.Module]:
    from diffusers import ChromaTransformer2DModel

    return {"transformer": ChromaTransformer2DModel()}


def pair() -> Pair:
    ours, values = tiny_chroma(27), [value.detach() for value in inputs(6, 10, 4)]
    theirs = diffusers_model(ours)
    predict = partial(velocity, ours, *values), partial(oracle_output, theirs, *values)
    return Pair(CHROMA_NAMES, ours, {"transformer": theirs}, *predict)


def masked(H: int, W: int, lengths: tuple[int, int] | None) -> tuple[Tensor | None, ...]:
    """Return latents, noise levels, text and the mask of caption tokens, if any."""
    is_text = None if lengths is None else torch.arange(NUM_TEXT) < torch.tensor(lengths)[:, None]
    return (*inputs(H, W), None if is_text is None else with_first_padding(is_text))


APPROXIMATOR = "distilled_guidance_layer.in_proj"
T5_OUTPUT = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
BASES = (
    Base(
        name="chroma",
        script="flux_train_network",
        module="networks.lora_flux",
        build=lambda f: [
            *build_tiny_chroma(f, 59), "--guidance_scale", "0", "--t5xxl_max_token_length", "32",
        ],
        everything={"train_approximator": "True", "in_dims": "[2,0,0,0,2]"},
        written=("chroma", "chroma"),
        runs={
            "text_cache": TEXT_CACHE,
            "approximator": ["--network_args", "train_approximator=True", "in_dims=2,0,0,0,2", "train_t5xxl=True"],
        },
        deeper={"num_double": 4, "num_single": 6},
        compared={
            # The block counts are odd and different, so that modulation rows in the wrong order would show.
            "chroma": Compared(
                partial(tiny_chroma, 21, replace(CONFIG, num_double=3, num_single=4)),
                diffusers_model,
                {
                    f"{size} {lengths}": partial(masked, *size, lengths)
                    for size in ((8, 8), (4, 14), (18, 6))
                    for lengths in (None, (3, 7), (0, NUM_TEXT))
                },
                oracle_output,
                velocity,
            )
        },
        pairs={"chroma": pair},
        verified={
            "flux chroma": lambda: tiny_chroma(62, replace(CONFIG, num_double=3, num_single=4)),
            "flux chroma with one block": lambda: tiny_chroma(64, replace(CONFIG, num_double=1, num_single=1)),
        },
        merged=("networks.lora_flux", {}),
        full_size={"Chroma": (1024, write_full_size)},
        readers=(
            ("chroma kohya", "SANNS", kohya("unet.double_blocks.0.img_attn_qkv", 3072)
             | kohya(f"unet.{APPROXIMATOR}", 64)
             | {f"{T5_OUTPUT}.lora_down.weight": (4, 4096), f"{T5_OUTPUT}.lora_up.weight": (4096, 4)}),
            ("chroma generic", "AANNA", peft(f"diffusion_model.{APPROXIMATOR}", 64)),
            ("chroma diffusers", "NNNAA", peft(f"transformer.{APPROXIMATOR}", 64)),
        ),
        in_layouts=build_tiny_chroma,
        listing=lambda: facts("lora_keys_chroma"),
        in_diffusers=InDiffusers(
            diffusers_models,
            "FluxLoraLoaderMixin",
            ("default", "in_dims=[5,6,7,8,9]", "train_t5xxl=True", "train_blocks=double"),
        ),
        in_comfyui="in_dims=[5,6,7,8,9]",
    ),
)  # fmt: skip
