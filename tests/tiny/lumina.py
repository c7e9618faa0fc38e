"""A tiny but complete Lumina Image 2.0 model: three files, one file of all, or a diffusers folder."""

import json
from pathlib import Path
from typing import Any, Literal

import torch

from library.architectures.lumina.model import LuminaConfig, NextDiT
from library.architectures.lumina.reference import diffusers_config, diffusers_state
from tests.tiny.flux import VAE, ldm_vae
from tests.tiny.init import fixed_init
from tests.tiny.parts import BASE, Parts, prefixed, tiny_denoiser, write_files, write_folder, write_whole

Layout = Literal["files", "whole", "diffusers"]

CONFIG = LuminaConfig(
    in_features=64,
    width=72,
    head_width=12,
    num_kv_heads=2,
    mlp_width=288,
    text_width=32,
    time_width=72,
    time_hidden=72,
    num_context_refiners=2,
    num_noise_refiners=2,
    num_layers=2,
)
GEMMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
}
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
LETTERS = "\u2581abcdefghijklmnopqrstuvwxyzPS<>,."
MERGES = (("c", "a"), ("ca", "t"), ("d", "o"), ("do", "g"), ("r", "e"), ("re", "d"))


def build_tiny_lumina(folder: Path, seed: int, layout: Layout = "files") -> list[str]:
    """Write a tiny model into `folder` and return the options that select it. Equal seeds give equal weights in
    every layout."""
    parts = tiny_parts(seed, write_gemma_tokenizer(folder / "tokenizer"))
    if layout == "diffusers":
        return write_folder(
            folder, {"_class_name": "Lumina2Pipeline"}, parts, lambda state: diffusers_state(state, CONFIG)
        )
    lumina = {**parts["transformer"][1], "norm_final.weight": torch.ones(CONFIG.width)}
    gemma, vae = parts["text_encoder"][1], ldm_vae(parts["vae"][1])
    if layout == "whole":
        text = prefixed("text_encoders.gemma2_2b.transformer.model.", gemma)
        text["text_encoders.gemma2_2b.logit_scale"] = torch.ones(())
        return write_whole(folder, BASE, "lumina_2", lumina, vae, text)
    encoder = ("gemma_2_2b", prefixed("model.", gemma))
    return write_files(folder, {BASE: ("lumina-image-2", lumina), "--ae": ("ae", vae), "--gemma2": encoder})


def tiny_parts(seed: int, num_words: int) -> Parts:
    """Return (config.json, weights) by diffusers' folder name; the denoiser has our names."""
    from diffusers import AutoencoderKL

    gemma = tiny_gemma(num_words)
    lumina = tiny_lumina(seed)
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE)
    config = {**GEMMA, "vocab_size": num_words, "model_type": "gemma2", "architectures": ["Gemma2Model"]}
    return {
        "transformer": (diffusers_config(CONFIG), lumina.state_dict()),
        "vae": (json.loads(vae.to_json_string()), fixed_init(vae, seed + 1)),
        "text_encoder": (config, fixed_init(gemma, seed + 2)),
    }


def tiny_gemma(num_words: int) -> Any:
    """Return the text encoder as transformers builds it, with arbitrary weights."""
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(**GEMMA, vocab_size=num_words)).eval()


def write_gemma_tokenizer(folder: Path) -> int:
    """Write Gemma's tokenizer with letters and a few words; return its vocabulary size."""
    from transformers import GemmaTokenizer

    words = [*SPECIAL, *LETTERS, *("".join(pair) for pair in MERGES)]
    tokenizer = GemmaTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=list(MERGES))
    tokenizer.save_pretrained(str(folder))
    return len(words)


def tiny_lumina(seed: int) -> NextDiT:
    """Return the denoiser alone, with random weights."""
    return tiny_denoiser(NextDiT, CONFIG, seed)
