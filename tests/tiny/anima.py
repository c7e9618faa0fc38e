"""A tiny but complete Anima model: the three files of its release, two of which can be folders."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.anima.layers import NAMES
from library.architectures.anima.llm_adapter import AdapterConfig
from library.architectures.anima.model import Anima, AnimaConfig, read_config
from library.architectures.anima.reference import conditioner_config, diffusers_models, transformer_config
from library.models.adapter_views import view_both
from library.models.names import inverse
from library.models.vae.qwen_image import ENDS, MIDDLE, QUANT, RESIDUAL
from tests.contracts.full_size import facts
from tests.tiny.base import TEXT_CACHE, Base, Compared, Deep, InDiffusers, Pair
from tests.tiny.flux import write_t5_tokenizer
from tests.tiny.headers import shapes_of, write_headers
from tests.tiny.init import fixed_init
from tests.tiny.keys import kohya, peft
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


# Its inputs, and the output of diffusers' transformer

NUM_SOURCE, NUM_WORDS = 9, 7
Values = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(H: int, W: int, seed: int = 0) -> Values:
    """Latents, noise levels, Qwen3's states and their mask, T5's ids and their mask; captions differ in length."""
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 16, H, W, generator=g).requires_grad_()
    source_mask = torch.ones(2, NUM_SOURCE)
    source_mask[0, 5:] = 0
    source = (torch.randn(2, NUM_SOURCE, CONFIG.adapter.source_width, generator=g) * source_mask[..., None]).detach()
    ids = torch.randint(NUM_T5_WORDS, (2, NUM_WORDS), generator=g)
    mask = torch.ones(2, NUM_WORDS, dtype=torch.int64)
    mask[1, 4:] = 0
    return latents, torch.tensor([0.125, 0.875]), source.requires_grad_(), source_mask, ids, mask


def oracle_velocity(transformer: Any, latents: Tensor, sigmas: Tensor, text: Tensor) -> Tensor:
    padding = torch.zeros_like(latents[:, :1])  # passed as a channel, since the model's own method needs torchvision
    frames = torch.cat([latents, padding], dim=1)[:, :, None]
    sample: Tensor = transformer(hidden_states=frames, timestep=sigmas, encoder_hidden_states=text).sample[:, :, 0]
    return sample


def oracle_of(transformer: Any, conditioner: Any) -> Callable[..., Tensor]:
    """Return a function that combines both models and takes our arguments."""

    def run(latents: Tensor, sigmas: Tensor, source: Tensor, source_mask: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        text = conditioner(source, ids, target_attention_mask=mask, source_attention_mask=source_mask)
        return oracle_velocity(transformer, latents, sigmas, text)

    return run


def oracle(model: Anima) -> Callable[..., Tensor]:
    return oracle_of(*diffusers_models(model))


def write_full_size(folder: Path, num_blocks: int = 28) -> list[str]:
    """Repeat the last of the inventory's 28 blocks as often as `num_blocks` asks."""
    parts = facts("anima")["components"]
    last = {name: shape for name, shape in parts["dit"].items() if name.startswith("blocks.27.")}
    more = {name.replace("27", str(n), 1): shape for n in range(28, num_blocks) for name, shape in last.items()}
    write_t5_tokenizer(folder / "t5_tokenizer")
    write_qwen3_tokenizer(folder / "tokenizer")
    tables = {"pretrained_model_name_or_path": {**parts["dit"], **more}, "qwen3": parts["qwen3_0.6b"]}
    return write_headers(folder, {flag: shapes_of(table) for flag, table in {**tables, "vae": parts["vae"]}.items()})


def full_size_in_diffusers() -> dict[str, nn.Module]:
    from diffusers import AnimaTextConditioner, CosmosTransformer3DModel

    config = read_config(shapes_of(facts("anima")["components"]["dit"]))
    return {
        "transformer": CosmosTransformer3DModel(**transformer_config(config)),
        "text_conditioner": AnimaTextConditioner(**conditioner_config(config.adapter)),
    }


def pair() -> Pair:
    ours = tiny_anima(7)
    transformer, conditioner = diffusers_models(ours)
    values, run = [value.detach() for value in inputs(6, 10)], oracle_of(transformer, conditioner)
    theirs = {"transformer": transformer, "text_conditioner": conditioner}
    return Pair(NAMES, ours, theirs, lambda: ours(*values), lambda: run(*values))


EVERYTHING = "include_patterns everything + train_llm_adapter"
BASES = (
    Base(
        name="anima",
        script="anima_train_network",
        module="networks.lora_anima",
        build=lambda f: [*build_tiny_anima(f, 57), "--qwen3_max_token_length", "32", "--t5_max_token_length", "32"],
        adapts_text_encoders=True,
        everything={"train_llm_adapter": "True", "include_patterns": ".*"},
        written=("anima", "anima-preview"),
        runs={"text_cache": TEXT_CACHE, "text_adapter": ["--network_args", "train_llm_adapter=True"]},
        deeper={"num_blocks": 6},
        needs_newer="diffusers 0.32.2",
        default_shift=1.0,
        compared={
            "anima": Compared(
                partial(tiny_anima, 1),
                diffusers_models,
                {str(size): partial(inputs, *size) for size in ((8, 8), (4, 14), (18, 6))},
                lambda theirs, *values: oracle_of(*theirs)(*values),
                least=0.01,  # few of the 512 positions are words
            )
        },
        deep=Deep(
            lambda: Anima(replace(CONFIG, num_blocks=6)),
            lambda: tuple(value.detach() for value in inputs(8, 6, seed=44)),
            view_both,
            most_graphs=2,
        ),
        pairs={"anima": pair},
        unnamed=r"llm_adapter\.out_proj$",
        verified={"anima": lambda: tiny_anima(68, replace(CONFIG, num_blocks=4))},
        merged=("networks.lora_anima", {"train_llm_adapter": "True"}),
        full_size={
            "Anima": (1024, write_full_size),
            "Anima, 40 blocks": (1024, partial(write_full_size, num_blocks=40)),
        },
        readers=(
            ("anima kohya, self attention", "ANNNA", kohya("unet.blocks.0.self_attn.q_proj", 2048)),
            ("anima kohya, cross attention", "ANNNN", kohya("unet.blocks.0.cross_attn.q_proj", 2048)),
            ("anima kohya, output", "ANNNN", kohya("unet.blocks.0.self_attn.output_proj", 2048)),
            ("anima kohya, all of it", "ANNNS", kohya("unet.blocks.0.self_attn.q_proj", 2048)
             | kohya("unet.x_embedder.proj.1", 72) | kohya("unet.t_embedder.1.linear_1", 2048)
             | kohya("unet.final_layer.linear", 2048) | kohya("unet.blocks.0.adaln_modulation_mlp.1", 2048)),
            ("anima kohya, text adapter", "ANNNN", kohya("unet.llm_adapter.blocks.0.self_attn.q_proj", 1024)),
            ("anima generic", "ANNAA", peft("diffusion_model.blocks.0.cross_attn.q_proj", 2048)),
        ),
        listing=lambda: facts("lora_keys_anima"),
        in_diffusers=InDiffusers(
            full_size_in_diffusers,
            "AnimaLoraLoaderMixin",
            (
                "default", "train_llm_adapter=true", EVERYTHING, "network_train_unet_only",
                "network_train_text_encoder_only",
            ),
        ),
        in_comfyui=EVERYTHING,
    ),
)  # fmt: skip
