"""A tiny but complete Krea 2 model: three files, one file of all, or a diffusers folder."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from library.architectures.krea2.layers import KEYS, NAMES, NUM_BLOCKS
from library.architectures.krea2.model import AttentionConfig, Krea2Config, SingleStreamDiT
from library.architectures.krea2.reference import diffusers_config, diffusers_model, diffusers_state
from library.models.adapter_views import view_denoiser
from library.models.loading import build_on_meta_device
from tests.tiny.anima import VAE, to_original, vae_state
from tests.tiny.base import Base, Compared, Deep, Dit, InDiffusers, Pair, pair_of, training_command
from tests.tiny.headers import write_headers
from tests.tiny.keys import kohya, lora_of, peft
from tests.tiny.parts import BASE, Parts, prefixed, tiny_denoiser, write_files, write_folder, write_whole
from tests.tiny.qwen3_vl import MARKS, deep_vision, tiny_qwen3_vl
from tests.tiny.zimage import write_qwen3_tokenizer

Layout = Literal["files", "whole", "diffusers"]

CONFIG = Krea2Config(
    in_features=64,
    time_features=256,
    num_states=12,
    block=AttentionConfig(width=64, head_width=16, num_kv_heads=2, mlp_width=96),
    fusion=AttentionConfig(width=16, head_width=8, num_kv_heads=2, mlp_width=24),
    num_layerwise=2,
    num_refiners=2,
    num_blocks=2,
)
FULL_SIZE = Krea2Config(
    in_features=64,
    time_features=256,
    num_states=12,
    block=AttentionConfig(width=6144, head_width=128, num_kv_heads=12, mlp_width=16384),
    fusion=AttentionConfig(width=2560, head_width=128, num_kv_heads=20, mlp_width=6912),
    num_layerwise=2,
    num_refiners=2,
    num_blocks=28,
)
QWEN3_VL = {
    "hidden_size": CONFIG.fusion.width,
    "intermediate_size": 24,
    "num_hidden_layers": 36,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_section": [2, 1, 1]},
}
PREFIX = "model."  # of the text encoder's file, which also contains its vision model


def build_tiny_krea2(
    folder: Path, seed: int, layout: Layout = "files", flag: str = BASE, name: str = "raw"
) -> list[str]:
    """Write a tiny model into `folder` and return the options that select it, with the base model as `flag` and its
    transformer called `name`. Equal seeds give equal weights in every layout."""
    parts = tiny_parts(seed, write_qwen3_tokenizer(folder / "tokenizer", MARKS))
    if layout == "diffusers":
        index = {"_class_name": "Krea2Pipeline", "is_distilled": False}
        return write_folder(folder, index, parts, lambda state: diffusers_state(state, CONFIG), flag)
    denoiser, encoder = parts["transformer"][1], parts["text_encoder"][1]
    vae = {to_original(key): tensor for key, tensor in parts["vae"][1].items()}
    if layout == "whole":
        language = {key.removeprefix("language_"): tensor for key, tensor in encoder.items()}
        text = prefixed("text_encoders.qwen3vl_4b.transformer.", language)
        return write_whole(folder, flag, "krea2", denoiser, vae, text)
    files = {"--vae": ("qwen_image_vae", vae), "--text_encoder": ("qwen3vl_4b", prefixed(PREFIX, encoder))}
    return write_files(folder, {flag: (name, denoiser), **files})


def tiny_parts(seed: int, num_words: int) -> Parts:
    """Return (config.json, weights) by diffusers' folder name; the denoiser has our names, the VAE diffusers'."""
    encoder = tiny_qwen3_vl(seed + 2, num_words, deep_vision(24, (5, 11, 17)), **QWEN3_VL)
    return {
        "transformer": (diffusers_config(CONFIG), tiny_krea2(seed).state_dict()),
        "vae": ({**VAE, "_class_name": "AutoencoderKLQwenImage"}, vae_state(seed + 1)),
        "text_encoder": (json.loads(encoder.config.to_json_string()), encoder.state_dict()),
    }


def full_size_qwen3_vl() -> Any:
    """Return the language model of Qwen3-VL 4B on the meta device."""
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

    sizes = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    with torch.device("meta"):
        return Qwen3VLTextModel(Qwen3VLTextConfig(**sizes, num_key_value_heads=8, head_dim=128))


def full_size_vae() -> Any:
    """Return Qwen-Image's VAE on the meta device."""
    from diffusers import AutoencoderKLQwenImage

    with torch.device("meta"):
        return AutoencoderKLQwenImage()


def tiny_krea2(seed: int) -> SingleStreamDiT:
    """Return the denoiser alone, with random weights."""
    return tiny_denoiser(SingleStreamDiT, CONFIG, seed)


# Its inputs, and the output of diffusers' transformer

LENGTHS = (9, 5)  # tokens of the captions


def inputs(h: int, w: int, lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return latents, noise levels, zero-padded text, and its mask."""
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, h, w, generator=g).requires_grad_()
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    text = torch.randn(2, max(lengths), CONFIG.num_states * CONFIG.fusion.width, generator=g) * mask[..., None]
    return latents, torch.tensor([0.125, 0.875]), text.requires_grad_(), mask


def oracle_output(theirs: Any, latents: Tensor, sigmas: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Return diffusers' output, with tokens and positions built as in its pipeline."""
    from types import SimpleNamespace

    from diffusers import Krea2Pipeline

    B, C, H, W = latents.shape
    pipeline: Any = SimpleNamespace(patch_size=2, vae_scale_factor=8)
    tokens = theirs(
        Krea2Pipeline._pack_latents(pipeline, latents, B, C, H, W),
        encoder_hidden_states=text.unflatten(-1, (theirs.config.num_text_layers, -1)),
        timestep=sigmas,
        position_ids=Krea2Pipeline.prepare_position_ids(text.shape[1], H // 2, W // 2, text.device),
        encoder_attention_mask=mask.bool(),
        return_dict=False,
    )[0]
    return Krea2Pipeline._unpack_latents(pipeline, tokens, 8 * H, 8 * W)[:, :, 0]  # type: ignore[no-any-return]


def full_size() -> SingleStreamDiT:
    return build_on_meta_device(SingleStreamDiT, FULL_SIZE)


def write_full_size(folder: Path) -> list[str]:
    write_qwen3_tokenizer(folder / "tokenizer", MARKS)
    files = {"pretrained_model_name_or_path": full_size(), "text_encoder": full_size_qwen3_vl(), "vae": full_size_vae()}
    return write_headers(folder, files)


def diffusers_models() -> dict[str, nn.Module]:
    from diffusers import Krea2Transformer2DModel

    return {"transformer": Krea2Transformer2DModel()}


def pair() -> Pair:
    ours = tiny_krea2(7)
    return pair_of(NAMES, ours, diffusers_model(ours), inputs(4, 6), oracle_output)


DIT = Dit(
    build=build_tiny_krea2,
    stored_layer="blocks.0.attn.wq",
    mark="<|im_end|>",
    encoder="Qwen/Qwen3-VL-4B-Instruct",
    names=NAMES,
    model=partial(tiny_krea2, 7),
    values=lambda: [value.detach() for value in inputs(4, 6)],
    theirs=diffusers_model,
    run_theirs=oracle_output,
    pipeline="Krea2Pipeline",
    layer=("lora_unet_blocks_0_attn_wq", "blocks.0.attn.wq"),
    blocks=("",),
    own=({"mlp_dim": "0", "txtfusion_dim": "2"}, {}),
    plain={"exclude_patterns": "['.*']", "include_patterns": r"['blocks\..*\.attn\..*']"},
    trainers=[
        ("musubi-tuner", False),
        ("ai-toolkit", False),
        ("PEFT", False),
        ("SimpleTuner", True),
        ("OneTrainer, kohya", True),
    ],
    converted=(
        "lora_unet_blocks_0_attn_wq.lora_down.weight",
        "diffusion_model.blocks.0.attn.wq.lora_A.weight",
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
    ),
    architectures={"files": "Krea-2", "whole": "Krea-2"},
    trained={"": lambda folder: build_tiny_krea2(folder, 31)},
    training=training_command(
        "--dit {dit} --vae {vae}", "--timestep_sampling shift --discrete_flow_shift 2.5", "networks.lora_krea2"
    ),
    num_adapted=8 * (CONFIG.num_blocks + CONFIG.num_layerwise + CONFIG.num_refiners) + 8,
    saved=("diffusion_model.blocks.0.attn.wq", CONFIG.block.width),
    full_size={"": (FULL_SIZE, 12_820_073_036)},
    adapted=("", ""),
    embedders=r"(?!)",
    theirs_in_file={
        "blocks_0_attn_wk": (CONFIG.block.width // 2, CONFIG.block.width),
        "blocks_0_attn_gate": (CONFIG.block.width, CONFIG.block.width),
    },
    continued_ranks={f"diffusion_model.blocks.0.attn.{part}": 2 for part in ("wk", "gate")},
)
BASES = (
    Base(
        name="krea2",
        script="krea2_train_network",
        module="networks.lora_krea2",
        build=lambda folder: build_tiny_krea2(folder, 62),
        everything=DIT.own[-1],
        written=("krea2", "Krea-2"),
        releases=(("--dit_variant", "turbo"), ("--dit_variant", "raw")),
        deeper={"num_blocks": 6},
        needs_newer="transformers 4.54.1",
        default_shift=math.exp(0.5 + 0.65 * (4096 - 256) / (6400 - 256)),
        other_options=("turbo_dit_cache",),
        compared={
            "krea2": Compared(
                partial(tiny_krea2, 1),
                diffusers_model,
                {
                    f"{size} {lengths}": partial(inputs, *size, lengths)
                    for size in ((8, 8), (4, 10), (14, 2))
                    for lengths in (LENGTHS, (7, 7))
                },
                oracle_output,
            )
        },
        deep=Deep(
            lambda: SingleStreamDiT(replace(CONFIG, num_blocks=6)),
            lambda: tuple(value.detach() for value in inputs(4, 6)),
            view_denoiser,
            most_graphs=6,
        ),
        pairs={"krea2": pair},
        verified={"krea2": lambda: tiny_denoiser(SingleStreamDiT, replace(CONFIG, num_blocks=3), 72)},
        count_share=0.05,  # copies of twelve states per caption token, which fake tensors do not need
        count_shape=(2, 768, 512),  # with smaller images the text fusion would be the peak
        full_size={"Krea 2": (1024, write_full_size)},
        readers=(
            ("krea 2, as it is saved", "ANNAN", peft("diffusion_model.blocks.0.attn.wq", 6144)),
            ("krea 2 kohya", "ANNNN", kohya("unet.blocks.0.mlp.gate", 6144)),
            ("krea 2 kohya, diffusers' paths", "NNNNN", kohya("unet.transformer_blocks.0.attn.to_gate", 6144)),
            ("krea 2 diffusers", "ANNAN", peft("transformer.transformer_blocks.0.ff.gate", 6144)),
            ("krea 2, diffusers' paths in ComfyUI's place", "NNNNN", peft("diffusion_model.text_fusion.projector", 12)),
        ),
        listing=lambda: lora_of(full_size(), KEYS.linear_paths(NUM_BLOCKS)),
        in_diffusers=InDiffusers(diffusers_models, "Krea2LoraLoaderMixin"),
        in_comfyui="default",
        dit=DIT,
    ),
)
