"""A tiny but complete Chroma model, the relative of FLUX.1: three files, one file of all, or a diffusers folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from library.architectures.flux.approximator import ApproximatorConfig
from library.architectures.flux.model import Flux, FluxConfig
from tests.tiny import flux
from tests.tiny.flux import (
    Layout,
    Parts,
    diffusers_config,
    ldm_vae,
    tiny_t5,
    tiny_vae,
    write_folder,
    write_t5_tokenizer,
)
from tests.tiny.init import fixed_init

CONFIG = replace(flux.CONFIG, pooled_width=0, approximator=ApproximatorConfig(in_features=16, hidden_width=48, depth=2))
FLUX_ONLY = ("pooled_projection_dim", "guidance_embeds")  # arguments of diffusers' class


def build_tiny_chroma(folder: Path, seed: int, layout: Layout = "files") -> list[str]:
    """Write a tiny model into `folder` and return the arguments that name it. One seed has the same weights in every
    layout."""
    from safetensors.torch import save_file

    num_words = write_t5_tokenizer(folder / ("tokenizer" if layout == "diffusers" else "tokenizer_2"))
    model = tiny_chroma(seed)
    parts: Parts = {
        "transformer": (chroma_diffusers_config(model.config), model.state_dict()),
        "vae": tiny_vae(seed + 1),
        "text_encoder": tiny_t5(seed + 3, num_words),
    }
    kind = ["--model_type", "chroma"]
    if layout == "diffusers":
        return ["--pretrained_model_name_or_path", str(write_folder(folder, parts, "ChromaPipeline")), *kind]
    chroma, vae, t5 = parts["transformer"][1], ldm_vae(parts["vae"][1]), parts["text_encoder"][1]
    base = folder / "chroma.safetensors"
    if layout == "whole":
        everything = {f"model.diffusion_model.{key}": tensor for key, tensor in chroma.items()}
        everything |= {f"vae.{key}": tensor for key, tensor in vae.items()}
        everything |= {f"text_encoders.t5xxl.transformer.{key}": tensor for key, tensor in t5.items()}
        save_file(everything, base)
        return ["--pretrained_model_name_or_path", str(base), *kind]
    save_file(chroma, base)
    save_file(vae, folder / "ae.safetensors")
    save_file(t5, folder / "t5xxl.safetensors")
    others = ["--ae", str(folder / "ae.safetensors"), "--t5xxl", str(folder / "t5xxl.safetensors")]
    return ["--pretrained_model_name_or_path", str(base), *others, *kind]


def tiny_chroma(seed: int, config: FluxConfig | None = None) -> Flux:
    """The denoiser alone, its weights random."""
    with torch.device("meta"):
        model = Flux(config or CONFIG)
    model.load_state_dict(fixed_init(model, seed), assign=True)
    return model.requires_grad_(False).eval()


def chroma_diffusers_config(config: FluxConfig = CONFIG) -> dict[str, Any]:
    """Arguments of diffusers' ChromaTransformer2DModel."""
    sizes = config.approximator
    assert sizes is not None
    return {
        **{name: value for name, value in diffusers_config(config).items() if name not in FLUX_ONLY},
        "approximator_num_channels": sizes.in_features,
        "approximator_hidden_dim": sizes.hidden_width,
        "approximator_layers": sizes.depth,
    }
