"""A tiny but complete Anima model: the three files of its release, two of which can be folders."""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from library.architectures.anima.llm_adapter import AdapterConfig
from library.architectures.anima.model import Anima, AnimaConfig
from library.models.names import inverse
from library.models.vae.qwen_image import ENDS, MIDDLE, QUANT, RESIDUAL
from tests.tiny.flux import write_t5_tokenizer
from tests.tiny.init import fixed_init
from tests.tiny.parts import tiny_denoiser

QWEN_WIDTH = 40
NUM_T5_WORDS = 24

CONFIG = AnimaConfig(
    channels=16,
    width=48,
    head_width=24,
    mlp_width=192,
    text_width=32,
    modulation_rank=8,
    num_blocks=2,
    adapter=AdapterConfig(
        num_words=NUM_T5_WORDS, width=32, source_width=QWEN_WIDTH, head_width=8, mlp_width=128, num_blocks=2
    ),
)
QWEN3 = {
    "hidden_size": QWEN_WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
}
VAE = {
    "base_dim": 4,
    "z_dim": 16,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "input_channels": 3,
}


def build_tiny_anima(folder: Path, seed: int, prefix: str = "net.", has_folders: bool = False) -> list[str]:
    """Write a tiny model into `folder` and return the options that select it. Equal seeds give equal weights.
    `has_folders` writes Qwen3 and the VAE as folders, in the layouts of transformers and diffusers."""
    from safetensors.torch import save_file

    assert write_t5_tokenizer(folder / "t5_tokenizer") < NUM_T5_WORDS  # as in the real model, which has spare words
    num_words = write_qwen3_tokenizer(folder / "tokenizer")
    denoiser = {prefix + key: tensor for key, tensor in tiny_anima(seed).state_dict().items()}
    save_file(denoiser, folder / "anima.safetensors")
    qwen3, vae = qwen3_state(seed + 1, num_words), vae_state(seed + 2)
    if has_folders:
        config = {**QWEN3, "vocab_size": num_words, "architectures": ["Qwen3Model"], "model_type": "qwen3"}
        names = ["qwen3", "vae"]
        for name, told, stem, state in (
            ("qwen3", config, "model", qwen3),
            ("vae", {**VAE, "_class_name": "AutoencoderKLQwenImage"}, "diffusion_pytorch_model", vae),
        ):
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps(told))
            save_file(state, folder / name / f"{stem}.safetensors", {"format": "pt"})
    else:
        names = ["qwen3.safetensors", "qwen_image_vae.safetensors"]
        save_file({f"model.{key}": tensor for key, tensor in qwen3.items()}, folder / names[0])
        save_file({to_original(key): tensor for key, tensor in vae.items()}, folder / names[1])
    return [
        "--pretrained_model_name_or_path", str(folder / "anima.safetensors"), "--qwen3", str(folder / names[0]),
        "--vae", str(folder / names[1]),
    ]  # fmt: skip


def qwen3_state(seed: int, num_words: int) -> dict[str, Tensor]:
    from transformers import Qwen3Config, Qwen3Model

    with torch.device("meta"):
        model = Qwen3Model(Qwen3Config(**QWEN3, vocab_size=num_words))
    return fixed_init(model, seed)


def vae_state(seed: int) -> dict[str, Tensor]:
    """Return the weights of the VAE under diffusers' names."""
    from diffusers import AutoencoderKLQwenImage

    with torch.device("meta"):
        model = AutoencoderKLQwenImage(**VAE)
    return fixed_init(model, seed)


def to_original(key: str) -> str:
    """Return the original name of a weight of the tiny VAE."""
    part, _, rest = key.partition(".")
    if part in inverse(QUANT):
        return f"{inverse(QUANT)[part]}.{rest}"
    if match := re.match(r"mid_block\.(\w+\.\d)\.(.+)", rest):
        return f"{part}.middle.{inverse(MIDDLE)[match[1]]}.{block_tail(match[2])}"
    if match := re.match(r"down_blocks\.(\d+)\.(.+)", rest):
        return f"{part}.downsamples.{match[1]}.{block_tail(match[2])}"
    if match := re.match(r"up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)", rest):
        place = int(match[3]) if match[2] == "resnets" else 2  # after the two residual blocks of a level
        return f"{part}.upsamples.{3 * int(match[1]) + place}.{block_tail(match[4])}"
    stem, _, leaf = rest.rpartition(".")
    return f"{part}.{inverse(ENDS)[stem]}.{leaf}"


def block_tail(tail: str) -> str:
    stem, _, leaf = tail.rpartition(".")
    return f"{inverse(RESIDUAL).get(stem, stem)}.{leaf}"


def write_qwen3_tokenizer(folder: Path) -> int:
    """Write Qwen3's tokenizer with all bytes and a few words; return its vocabulary size."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    merges = [("c", "a"), ("ca", "t"), ("d", "o"), ("do", "g"), ("r", "e"), ("re", "d"), ("\u0120", "a")]
    words = [*sorted(ByteLevel.alphabet()), *("".join(pair) for pair in merges), "<|endoftext|>"]
    Qwen2Tokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges).save_pretrained(str(folder))
    return len(words)


def tiny_anima(seed: int, config: AnimaConfig | None = None) -> Anima:
    """Return the denoiser alone, with random weights."""
    return tiny_denoiser(Anima, config or CONFIG, seed)
