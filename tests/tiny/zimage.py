"""A tiny but complete Z-Image model: three files, one file of all, or a diffusers folder."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from library.architectures.zimage.layers import KEYS, NAMES, NUM_BLOCKS
from library.architectures.zimage.model import ZImage, ZImageConfig
from library.architectures.zimage.reference import diffusers_config, diffusers_model, diffusers_state
from library.models.adapter_views import view_denoiser
from library.models.loading import build_on_meta_device
from tests.tiny.base import Base, Compared, Deep, Dit, InDiffusers, Pair, pair_of, training_command
from tests.tiny.flux import VAE, ldm_vae
from tests.tiny.headers import flux_vae, write_headers
from tests.tiny.init import fixed_init
from tests.tiny.keys import kohya, lora_of, peft
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
            folder, {"_class_name": "ZImagePipeline"}, parts, lambda state: diffusers_state(state, CONFIG), flag
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


# Its inputs, and the output of diffusers' transformer

NUM_TEXT = 40
LENGTHS = {"whole": (40, 40), "multiple": (32, 32), "one multiple": (5, 31), "uneven": (3, 40)}  # of the captions


def inputs(H: int, W: int, lengths: tuple[int, int] = LENGTHS["whole"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return latents, times, text, and the mask of its caption tokens."""
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 16, H, W, generator=g).requires_grad_()
    text = torch.randn(2, NUM_TEXT, CONFIG.text_width, generator=g).requires_grad_()
    mask = torch.tensor([[1] * n + [0] * (NUM_TEXT - n) for n in lengths])
    return latents, torch.tensor([0.125, 0.875]), text, mask


def oracle_output(theirs: Any, latents: Tensor, times: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """Return diffusers' output; it takes captions as a list without padding and images as one-frame videos."""
    captions = [states[: int(sample_mask.sum())] for states, sample_mask in zip(text, mask, strict=True)]
    frames = theirs(list(latents[:, :, None]), times, captions, return_dict=False)[0]
    return torch.stack(frames)[:, :, 0]


def full_size() -> ZImage:
    return build_on_meta_device(ZImage, FULL_SIZE)


def write_full_size(folder: Path) -> list[str]:
    write_qwen3_tokenizer(folder / "tokenizer")
    files = {"pretrained_model_name_or_path": full_size(), "text_encoder": full_size_qwen3(), "vae": flux_vae()}
    return write_headers(folder, files)


def diffusers_models() -> dict[str, nn.Module]:
    from diffusers import ZImageTransformer2DModel

    return {"transformer": ZImageTransformer2DModel()}


def pair() -> Pair:
    ours = tiny_zimage(7)
    return pair_of(NAMES, ours, diffusers_model(ours), inputs(6, 10, (5, 40)), oracle_output)


DIT = Dit(
    build=build_tiny_zimage,
    stored_layer="layers.0.attention.qkv",
    mark="<|im_end|>",
    encoder="Qwen/Qwen3-4B",
    names=NAMES,
    model=partial(tiny_zimage, 7),
    values=lambda: [value.detach() for value in inputs(6, 10, (5, 40))],
    theirs=diffusers_model,
    run_theirs=oracle_output,
    pipeline="ZImagePipeline",
    layer=("lora_unet_layers_0_attention_out", "layers.0.attention.to_out.0"),
    blocks=("layers.",),
    own=({}, {"embedder_dims": "[2,2,2]", "include_patterns": "['.*']"}),
    plain={"split_qkv": "True"},
    trainers=[
        (name, True) for name in ("musubi-tuner", "ai-toolkit", "SimpleTuner", "OneTrainer, kohya", "OneTrainer")
    ],
    converted=(
        "lora_unet_layers_0_attention_qkv.lora_down.weight",
        "diffusion_model.layers.0.attention.qkv.lora_A.weight",
        "diffusion_model.layers.0.attention.to_q.lora_A.weight",
    ),
    architectures={"files": "Z-Image", "whole": "Z-Image"},
    trained={"": lambda folder: build_tiny_zimage(folder, 31)},
    training=training_command(
        "--dit {dit} --vae {vae} --text_encoder {text}",
        "--timestep_sampling shift --discrete_flow_shift 2.0",
        "networks.lora_zimage",
    ),
    num_adapted=7 * CONFIG.num_layers,
    saved=("diffusion_model.layers.0.attention.to_q", CONFIG.width),
    encoder_in_8_bits="--fp8_llm",
    full_size={"": (FULL_SIZE, 6_154_908_736)},
    adapted=(r"layers\.(?!.*_modulation)", r"(?!all_final_layer)"),
    embedders=r".*_embedder",
    theirs_in_file={
        f"layers_0_attention_{part}": (CONFIG.width, CONFIG.width) for part in ("to_q", "to_k", "to_v", "to_out_0")
    },
    continued_ranks={  # q, k and v are one layer
        f"diffusion_model.layers.0.attention.{part}": rank
        for part, rank in {"to_q": 6, "to_k": 6, "to_v": 6, "to_out.0": 2}.items()
    },
)
BASES = (
    Base(
        name="zimage",
        script="zimage_train_network",
        module="networks.lora_zimage",
        build=lambda folder: build_tiny_zimage(folder, 60),
        everything=DIT.own[-1],
        written=("zimage", "Z-Image"),
        releases=tuple(("--model_version", version) for version in ("turbo", "base", "de-turbo")),
        deeper={"num_layers": 6},
        is_velocity_reversed=True,
        default_shift=2.0,
        compared={
            "zimage": Compared(
                partial(tiny_zimage, 1),
                diffusers_model,
                {
                    f"{size} {name}": partial(inputs, *size, lengths)
                    for size in ((16, 16), (4, 14), (18, 6))  # 64, 28 and 27 tokens; the last two are padded
                    for name, lengths in LENGTHS.items()
                },
                oracle_output,
            )
        },
        deep=Deep(
            lambda: ZImage(replace(CONFIG, num_layers=6)),
            lambda: tuple(value.detach() for value in inputs(8, 6, (5, 40))),
            view_denoiser,
            most_graphs=6,
        ),
        pairs={"zimage": pair},
        verified={"zimage": lambda: tiny_denoiser(ZImage, replace(CONFIG, num_layers=4), 67)},
        merged=("networks.lora_zimage", {"include_patterns": "['.*']"}),
        full_size={"Z-Image": (1024, write_full_size)},
        readers=(
            ("zimage, as it is saved", "ANNAN", peft("diffusion_model.layers.0.attention.to_q", 3840)),
            ("zimage, its last part", "ANNAN", peft("diffusion_model.layers.0.attention.to_out.0", 3840)),
            ("zimage diffusers", "ANNAN", peft("transformer.layers.0.attention.to_q", 3840)),
            ("zimage kohya", "ANNAN", kohya("unet.layers.0.attention.qkv", 3840)),
            ("zimage kohya, by musubi-tuner", "NNNAN", kohya("unet.layers.0.attention.to_q", 3840)),
            ("zimage generic", "ANNNN", peft("diffusion_model.layers.0.attention.qkv", 3840)),
            ("zimage generic, feed-forward", "ANNAN", peft("diffusion_model.layers.0.feed_forward.w1", 3840)),
        ),
        listing=lambda: lora_of(full_size(), KEYS.linear_paths(NUM_BLOCKS)),
        in_diffusers=InDiffusers(diffusers_models, "ZImageLoraLoaderMixin"),
        in_comfyui="default",
        dit=DIT,
    ),
)
