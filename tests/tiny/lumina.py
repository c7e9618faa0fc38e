"""A tiny but complete Lumina Image 2.0 model: three files, one file of all, or a diffusers folder."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from library.architectures.lumina.layers import NAMES
from library.architectures.lumina.model import LuminaConfig, NextDiT
from library.architectures.lumina.reference import diffusers_config, diffusers_model, diffusers_state
from library.models.adapter_views import view_both
from tests.contracts.full_size import facts
from tests.tiny.base import Base, Compared, Deep, InDiffusers, Pair, pair_of
from tests.tiny.flux import VAE, ldm_vae
from tests.tiny.headers import flux_vae, shapes_of, write_headers
from tests.tiny.init import fixed_init
from tests.tiny.keys import Shapes, kohya, peft
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


# Its inputs, and the output of diffusers' transformer

NUM_TEXT = 7
MASKS = {"whole": (NUM_TEXT, NUM_TEXT), "even": (4, 4), "uneven": (5, 2)}  # tokens of each caption


def inputs(H: int, W: int, tokens: tuple[int, int] = MASKS["whole"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return latents, times, text, and the mask of its caption tokens."""
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, H, W, generator=g).requires_grad_()
    text = torch.randn(2, NUM_TEXT, CONFIG.text_width, generator=g).requires_grad_()
    mask = torch.tensor([[1] * n + [0] * (NUM_TEXT - n) for n in tokens])
    return latents, torch.tensor([0.125, 0.875]), text, mask


def oracle_output(theirs: Any, latents: Tensor, times: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    return theirs(latents, times, text, mask, return_dict=False)[0]  # type: ignore[no-any-return]


def write_full_size(folder: Path) -> list[str]:
    parts = facts("lumina2")["components"]
    write_gemma_tokenizer(folder / "tokenizer")
    shapes = {"pretrained_model_name_or_path": shapes_of(parts["dit"]), "gemma2": shapes_of(parts["gemma2"])}
    return write_headers(folder, {**shapes, "ae": flux_vae()})


def diffusers_models() -> dict[str, nn.Module]:
    from diffusers import Lumina2Transformer2DModel

    return {"transformer": Lumina2Transformer2DModel(cap_feat_dim=2304)}


def pair() -> Pair:
    ours = tiny_lumina(7)
    return pair_of(NAMES, ours, diffusers_model(ours), inputs(6, 10, (5, 2)), oracle_output)


def full_block(place: str, has_modulation: bool = True) -> Shapes:
    """Return the adapter keys of every module of one block in the generic naming."""
    names = ["attention.qkv", "attention.out", *(f"feed_forward.w{n}" for n in (1, 2, 3))]
    shapes: Shapes = {}
    for name in [*names, *(["adaLN_modulation.1"] if has_modulation else [])]:
        shapes |= peft(f"diffusion_model.{place}.{name}", 2304)
    return shapes


BASES = (
    Base(
        name="lumina",
        script="lumina_train_network",
        module="networks.lora_lumina",
        build=lambda folder: [*build_tiny_lumina(folder, 56), "--gemma2_max_token_length", "32"],
        adapts_text_encoders=True,
        unused="te_layers_2_",
        everything={"split_qkv": "True", "embedder_dims": "[2,2,2]"},
        written=("lumina2", "lumina-2"),
        deeper={"num_layers": 6},
        math_attention=r"math: query \w+ \[2, 6, \d+, 12\].*",  # the tiny model's head size is 12
        is_velocity_reversed=True,
        compared={
            "lumina": Compared(
                partial(tiny_lumina, 1),
                diffusers_model,
                {
                    f"{size} {name}": partial(inputs, *size, tokens)
                    for size in ((8, 8), (4, 14), (18, 6))
                    for name, tokens in MASKS.items()
                },
                oracle_output,
            )
        },
        deep=Deep(
            lambda: NextDiT(replace(CONFIG, num_layers=6)),
            lambda: tuple(value.detach() for value in inputs(8, 6, tokens=(7, 4))),
            view_both,
            most_graphs=6,
        ),
        pairs={"lumina": pair},
        verified={"lumina": lambda: tiny_denoiser(NextDiT, replace(CONFIG, num_layers=4), 66)},
        count_shape=(4, 384, 256),  # with large images small tensors count less
        merged=("networks.boft", {}),
        full_size={"Lumina Image 2.0": (1024, write_full_size)},
        readers=(
            ("lumina kohya", "ANNNN", kohya("unet.layers.0.attention.qkv", 2304)),
            ("lumina generic, a whole block", "ANNAN", full_block("layers.0")),
            ("lumina generic, a part of a block", "ANNNN", peft("diffusion_model.layers.0.attention.qkv", 2304)),
            ("lumina diffusers", "NNNAN", peft("transformer.noise_refiner.0.attn.to_q", 2304)),
        ),
        in_layouts=build_tiny_lumina,
        listing=lambda: facts("lumina2")["lora"],
        in_diffusers=InDiffusers(
            diffusers_models,
            "Lumina2LoraLoaderMixin",
            (
                "default",
                "embedder_dims=[5,6,7]",
                "attn_dim=0",
                "network_train_unet_only",
                "network_train_text_encoder_only",
            ),
        ),
        in_comfyui="embedder_dims=[5,6,7]",
    ),
)
