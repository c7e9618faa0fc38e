"""A tiny but complete Chroma model, the relative of FLUX.1: three files, one file of all, or a diffusers folder."""

from dataclasses import replace
from pathlib import Path

from library.architectures.flux.approximator import ApproximatorConfig
from library.architectures.flux.model import Flux, FluxConfig
from library.architectures.flux.reference import diffusers_config, diffusers_state
from tests.tiny import flux
from tests.tiny.flux import (
    Layout,
    ldm_vae,
    tiny_t5,
    tiny_vae,
    write_t5_tokenizer,
)
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
                folder, {"_class_name": "ChromaPipeline"}, parts, lambda state: diffusers_state(state, CONFIG.width)
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
