"""A tiny but complete Z-Image model: three files, one file of all, or a diffusers folder."""

import json
from pathlib import Path
from typing import Any, Literal

import torch

from library.architectures.zimage.model import ZImage, ZImageConfig
from library.architectures.zimage.reference import diffusers_config, diffusers_state
from tests.tiny.flux import VAE, ldm_vae
from tests.tiny.init import fixed_init
from tests.tiny.parts import BASE, Parts, prefixed, tiny_denoiser, write_files, write_folder, write_whole

Layout = Literal["files", "whole", "diffusers"]

CONFIG = ZImageConfig(
    in_features=64,
    width=48,
    head_width=16,
    num_kv_heads=3,
    mlp_width=128,
    text_width=40,
    time_width=48,
    time_hidden=1024,
    num_context_refiners=2,
    num_noise_refiners=2,
    num_layers=3,
)
FULL_SIZE = ZImageConfig(
    in_features=64,
    width=3840,
    head_width=128,
    num_kv_heads=30,
    mlp_width=10240,
    text_width=2560,
    time_width=256,
    time_hidden=1024,
    num_context_refiners=2,
    num_noise_refiners=2,
    num_layers=30,
)
QWEN3 = {
    "hidden_size": CONFIG.text_width,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
}
MERGES = [("c", "a"), ("ca", "t"), ("d", "o"), ("do", "g"), ("r", "e"), ("re", "d"), ("\u0120", "a")]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (  # like Qwen3's, for one user message
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)


def build_tiny_zimage(folder: Path, seed: int, layout: Layout = "files", flag: str = BASE) -> list[str]:
    """Write a tiny model into `folder` and return the options that select it, with the base model as `flag`. Equal
    seeds give equal weights in every layout."""
    parts = tiny_parts(seed, write_qwen3_tokenizer(folder / "tokenizer"))
    if layout == "diffusers":
        return write_folder(
            folder, {"_class_name": "ZImagePipeline"}, parts, lambda state: diffusers_state(state, CONFIG.width), flag
        )
    denoiser = {**parts["transformer"][1], "norm_final.weight": torch.ones(CONFIG.width)}
    qwen3, vae = parts["text_encoder"][1], ldm_vae(parts["vae"][1])
    if layout == "whole":
        text = prefixed("text_encoders.qwen3_4b.transformer.model.", qwen3)
        return write_whole(folder, flag, "z_image", denoiser, vae, text)
    encoder = ("qwen_3_4b", prefixed("model.", qwen3))
    return write_files(folder, {flag: ("z_image_bf16", denoiser), "--vae": ("ae", vae), "--text_encoder": encoder})


def tiny_parts(seed: int, num_words: int) -> Parts:
    """Return (config.json, weights) by diffusers' folder name; the denoiser has our names."""
    from diffusers import AutoencoderKL
    from transformers import Qwen3Config, Qwen3Model

    with torch.device("meta"):
        vae = AutoencoderKL(**VAE)
        qwen3 = Qwen3Model(Qwen3Config(**QWEN3, vocab_size=num_words))
    config = {**QWEN3, "vocab_size": num_words, "model_type": "qwen3", "architectures": ["Qwen3Model"]}
    return {
        "transformer": (diffusers_config(CONFIG), tiny_zimage(seed).state_dict()),
        "vae": (json.loads(vae.to_json_string()), fixed_init(vae, seed + 1)),
        "text_encoder": (config, fixed_init(qwen3, seed + 2)),
    }


def full_size_qwen3() -> Any:
    """Return Qwen3 4B on the meta device."""
    from transformers import Qwen3Config, Qwen3Model

    sizes = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    with torch.device("meta"):
        return Qwen3Model(Qwen3Config(**sizes, num_key_value_heads=8, head_dim=128, vocab_size=151936))


def write_qwen3_tokenizer(folder: Path, special: tuple[str, ...] = SPECIAL) -> int:
    """Write Qwen3's tokenizer with all bytes, a few words and the chat markers; return its vocabulary size."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    words = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in MERGES), *special]
    tokenizer = Qwen2Tokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=MERGES, additional_special_tokens=list(special[1:])
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(str(folder))
    return len(words)


def tiny_zimage(seed: int) -> ZImage:
    """Return the denoiser alone, with random weights."""
    return tiny_denoiser(ZImage, CONFIG, seed)
