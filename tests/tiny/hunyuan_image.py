"""A tiny but complete HunyuanImage 2.1 model: the four files of the original release, or a diffusers folder."""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from library.architectures.hunyuan_image.layers import NAMES, to_original
from library.architectures.hunyuan_image.model import HunyuanImage, HunyuanImageConfig
from library.architectures.hunyuan_image.qwen import TEMPLATE, qwen_config
from library.architectures.hunyuan_image.reference import diffusers_config, diffusers_model, diffusers_state
from library.models.adapter_views import view_denoiser
from tests.contracts.full_size import facts
from tests.tiny.base import Base, Deep, Pair, pair_of
from tests.tiny.headers import shapes_of, write_headers
from tests.tiny.init import fixed_init
from tests.tiny.keys import kohya, peft
from tests.tiny.parts import BASE, Parts, tiny_denoiser, write_files, write_folder

Layout = Literal["files", "diffusers"]

CONFIG = HunyuanImageConfig(
    in_features=64,
    width=64,
    head_width=32,
    mlp_width=256,
    text_width=48,
    glyph_width=32,
    glyph_mlp_width=2048,  # as diffusers has it for every size
    num_double=2,
    num_single=2,
    has_guidance=False,
    num_refiners=2,
    refiner_mlp_width=256,
)
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 64,
    "block_out_channels": [32, 32, 32, 32, 64, 128],
    "layers_per_block": 1,
    "spatial_compression_ratio": 32,
    "sample_size": 384,
    "scaling_factor": 0.75289,
}
NUM_QWEN_LAYERS = 4
QWEN_SHAPES = {  # from which its configuration is derived
    "embed_tokens.weight": (0, CONFIG.text_width),
    "layers.0.self_attn.k_proj.weight": (CONFIG.text_width, CONFIG.text_width),
    "layers.0.mlp.gate_proj.weight": (96, CONFIG.text_width),
    **{f"layers.{number}.": () for number in range(NUM_QWEN_LAYERS)},
}
BYT5 = {
    "vocab_size": 400,
    "d_model": CONFIG.glyph_width,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 8,
}
CAPTION_WORDS = "a photo of a red blue cat dog sitting running in the grass, with words on it"


def build_tiny_hunyuan_image(folder: Path, seed: int, layout: Layout = "files") -> list[str]:
    """Write a tiny model into `folder` and return the options that select it. Equal seeds give equal weights in
    every layout."""
    parts = tiny_parts(seed, write_qwen_tokenizer(folder / "tokenizer"))
    if layout == "diffusers":
        return write_folder(
            folder, {"_class_name": "HunyuanImagePipeline"}, parts, lambda state: diffusers_state(state, CONFIG)
        )
    qwen = {name.replace("model.language_model.", "model."): t for name, t in parts["text_encoder"][1].items()}
    files = {
        BASE: ("hunyuanimage2.1", original_denoiser(parts["transformer"][1])),
        "--vae": ("hunyuan_image_2.1_vae", original_vae(parts["vae"][1])),
        "--text_encoder": ("qwen_2.5_vl", qwen),
        "--byt5": ("byt5_small_glyphxl", parts["text_encoder_2"][1]),
    }
    return write_files(folder, files)


def tiny_parts(seed: int, num_words: int) -> Parts:
    """Return (config.json, weights) by diffusers' folder name; the denoiser has our names, the VAE diffusers'."""
    from diffusers import AutoencoderKLHunyuanImage
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        vae = AutoencoderKLHunyuanImage(**VAE)
        byt5 = T5EncoderModel(T5Config(**BYT5))
    qwen = fixed_init(whole_qwen(num_words), seed + 2)
    qwen_state = {f"model.language_model.{name}": tensor for name, tensor in qwen.items()}
    qwen_state |= {"lm_head.weight": torch.zeros(2, 3), "model.visual.patch_embed.proj.weight": torch.zeros(2, 3)}
    byt5_state = {k: v for k, v in fixed_init(byt5, seed + 3).items() if k != "encoder.embed_tokens.weight"}
    qwen_folder = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "text_config": {"num_attention_heads": 1}}
    return {
        "transformer": (diffusers_config(CONFIG), tiny_hunyuan_image(seed).state_dict()),
        "vae": (json.loads(vae.to_json_string()), fixed_init(vae, seed + 1)),
        "text_encoder": (qwen_folder, qwen_state),
        "text_encoder_2": ({**BYT5, "architectures": ["T5EncoderModel"]}, byt5_state),
    }


def whole_qwen(num_words: int) -> Any:
    """Return transformers' model with all of its layers and its last norm, on the meta device."""
    from accelerate import init_empty_weights
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    config = qwen_config({**QWEN_SHAPES, "embed_tokens.weight": (num_words, CONFIG.text_width)}, {})
    with init_empty_weights(include_buffers=False):
        return Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**config))


def original_denoiser(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the denoiser in the layout of the original single file, whose first layer is a convolution."""
    original = {to_original(name): tensor for name, tensor in state.items()}
    return original | {"img_in.proj.weight": original["img_in.proj.weight"][:, :, None, None]}


def original_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the VAE in the layout of the original single file."""
    return {original_vae_key(name): tensor for name, tensor in state.items()}


def original_vae_key(name: str) -> str:
    for theirs, ours in (
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
        ("mid_block.attentions.0.proj", "mid.attn_1.proj_out"),
        ("mid_block.attentions.0.to_", "mid.attn_1."),
        ("mid_block.attentions.0", "mid.attn_1"),
    ):
        name = name.replace(theirs, ours)
    match = re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(.+)", name)
    if match is None:
        return name
    num_blocks = 1 if match[1] == "encoder" else 2
    level, place = divmod(int(match[3]), num_blocks + 1)
    block = f"block.{place}" if place < num_blocks else f"{match[2]}sample"
    return f"{match[1]}.{match[2]}.{level}.{block}.{match[4]}"


def write_qwen_tokenizer(folder: Path) -> int:
    """Write a tokenizer of Qwen's kind with the words of the template and a few more; return its vocabulary size."""
    from tokenizers import trainers
    from transformers import Qwen2Tokenizer

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    text = re.sub(r"<\|\w+\|>", "", TEMPLATE.replace("{}", "")) + "\n" + CAPTION_WORDS
    backend = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=5000, min_frequency=1, show_progress=False, special_tokens=special)
    backend.train_from_iterator([text], trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, additional_special_tokens=special[1:])
    tokenizer.save_pretrained(str(folder))
    return max(tokenizer.get_vocab().values()) + 1


def tiny_hunyuan_image(seed: int) -> HunyuanImage:
    """Return the denoiser alone, with random weights."""
    return tiny_denoiser(HunyuanImage, CONFIG, seed)


# Its inputs, and the output of diffusers' transformer

NUM_TEXT, NUM_GLYPHS = 7, 5
TEXT_MASK = [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
GLYPH_MASKS = {"some": [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], "none": [[0] * NUM_GLYPHS] * 3}


def inputs(H: int, W: int, glyphs: str = "some", seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(3, CONFIG.in_features, H, W, generator=g).requires_grad_(),
        "timesteps": torch.tensor([125.0, 875.0, 501.0]),
        "text": torch.randn(3, NUM_TEXT, CONFIG.text_width, generator=g).requires_grad_(),
        "text_mask": torch.tensor(TEXT_MASK),
        "glyphs": torch.randn(3, NUM_GLYPHS, CONFIG.glyph_width, generator=g).requires_grad_(),
        "glyph_mask": torch.tensor(GLYPH_MASKS[glyphs]),
    }


def oracle_output(theirs: Any, values: dict[str, Tensor]) -> Tensor:
    return theirs(  # type: ignore[no-any-return]
        values["latents"],
        values["timesteps"],
        encoder_hidden_states=values["text"],
        encoder_attention_mask=values["text_mask"],
        encoder_hidden_states_2=values["glyphs"],
        encoder_attention_mask_2=values["glyph_mask"],
    ).sample


BYT5_WORDS = {"shared.weight": (1510, 1472)}  # the inventory omits them
DEEPER = {"num_double": 4, "num_single": 6}


def write_full_size(folder: Path) -> list[str]:
    parts = facts("hunyuan_image")["components"]
    write_qwen_tokenizer(folder / "tokenizer")
    names = {"pretrained_model_name_or_path": "dit", "vae": "vae", "text_encoder": "qwen2_5_vl"}
    shapes = {flag: shapes_of(parts[part]) for flag, part in names.items()}
    return write_headers(folder, {**shapes, "byt5": {**shapes_of(parts["byt5"]), **BYT5_WORDS}})


def detached(values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    return tuple(value.detach() for value in values.values())


def pair() -> Pair:
    ours, values = tiny_hunyuan_image(7), inputs(3, 5)

    def run_theirs(theirs: Any, *given: Tensor) -> Tensor:
        return oracle_output(theirs, dict(zip(values, given, strict=True)))

    return pair_of(NAMES, ours, diffusers_model(ours), detached(values), run_theirs)


BASES = (
    Base(
        name="hunyuan_image",
        script="hunyuan_image_train_network",
        module="networks.lora_hunyuan_image",
        build=lambda folder: build_tiny_hunyuan_image(folder, 58),
        everything={"split_qkv": "True"},
        written=("hunyuan-image-2.1", "hunyuan-image-2.1"),
        deeper=DEEPER,
        blocks_to_swap="3",
        needs_newer="transformers 4.54.1",
        # The single attention of the VAE has no head dimension (4,096 tokens at 2048 px, 64 MB of scores).
        math_attention=r"math: .* at .*/autoencoder_kl_hunyuanimage.py.*",
        offset_words=("--timestep_sampling", "shift", "--sigmoid_scale", "0.7"),
        deep=Deep(
            lambda: HunyuanImage(replace(CONFIG, **DEEPER)),
            lambda: detached(inputs(4, 6, seed=46)),
            view_denoiser,
            most_graphs=4,
        ),
        pairs={"hunyuan_image": pair},
        unnamed=r"(?!double_blocks|single_blocks)",
        verified={
            "hunyuan_image": lambda: tiny_denoiser(HunyuanImage, replace(CONFIG, num_double=3, num_single=4), 69)
        },
        merged=("networks.dylora", {}),
        full_size={"HunyuanImage 2.1": (2048, write_full_size)},
        readers=(
            ("hunyuan, the module paths", "NNNNN", kohya("unet.double_blocks.0.img_mlp.fc1", 3584)),
            ("hunyuan, ComfyUI's names", "ANNNN", kohya("unet.double_blocks.0.img_mlp.0", 3584)),
            ("hunyuan diffusers", "NNNNN", peft("transformer.single_transformer_blocks.0.attn.to_q", 3584)),
            ("hunyuan diffusers, double blocks", "NNNNN", peft("transformer.transformer_blocks.0.attn.to_q", 3584)),
            ("hunyuan generic", "ANNNN", peft("diffusion_model.double_blocks.0.img_attn.qkv", 3584)),
        ),
        listing=lambda: facts("lora_keys_hunyuan_image"),
        in_comfyui="default",
    ),
)
