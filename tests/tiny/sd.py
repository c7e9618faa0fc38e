"""A tiny but complete Stable Diffusion 1.x or 2.x model, as a diffusers folder or a single file."""

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from library.architectures.sd import assembly
from library.architectures.sd.layers import unet_module
from library.architectures.sd.load import CLIP_PREFIXES
from library.checkpoints.adapter_names import BaseNames
from library.models.unet.checkpoint_keys import UNET_PREFIX, UnetLayout, unet_to_ldm
from library.models.unet.unet import run_unet_blocks_with, unet_stacks
from library.models.vae.checkpoint_keys import VAE_PREFIX, vae_to_ldm
from tests.contracts.full_size import facts
from tests.hiding import lazily
from tests.tiny.base import Base, Deep, Pair, layers_of, path_argument
from tests.tiny.headers import shapes_of, write_headers
from tests.tiny.init import fixed_init
from tests.tiny.keys import Shapes, kohya, peft
from tests.tiny.open_clip import to_open_clip
from tests.tiny.parts import Parts
from tests.tiny.parts import write_folder as write_parts

diffusers = lazily("diffusers")
transformers = lazily("transformers")

Layout = Literal["diffusers", "safetensors", "ckpt"]
FULL_SIZE = Path(__file__).parents[1] / "contracts" / "data" / "sd15.json.gz"

UNET_LAYOUT = UnetLayout(layers_per_block=1, has_attention=(True, True, False))
UNET = {
    "block_out_channels": (16, 32, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 16,
    "sample_size": 8,
}
VAE = {
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 64,
}
CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
UNET_V2 = {**UNET, "attention_head_dim": 1, "use_linear_projection": True}  # diffusers means the number of heads
CLIP_V2 = {**CLIP, "hidden_act": "gelu"}
MERGES = ("c a", "ca t</w>", "d o", "do g</w>", "a n", "an d</w>", "r e", "re d</w>")
PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def build_tiny_sd(folder: Path, seed: int, layout: Layout = "diffusers", is_v2: bool = False) -> Path:
    """Write a tiny model into `folder` and return what --pretrained_model_name_or_path takes.

    Images of 64 px have 8x8 latents. A single file has its tokenizer/ next to it. Equal seeds give equal weights in
    every layout.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocab = write_tokenizer(folder / "tokenizer", pad="!" if is_v2 else "<|endoftext|>")
    parts = tiny_parts(seed, vocab, is_v2)
    if layout == "diffusers":
        return write_folder(folder, parts)
    tensors = ldm_tensors({name: state for name, (_, state) in parts.items()}, is_v2)
    path = folder / f"tiny_sd.{layout}"
    if layout == "ckpt":
        torch.save({"state_dict": tensors, "global_step": 7}, path)
    else:
        from safetensors.torch import save_file

        save_file(tensors, path)
    return path


def tiny_parts(seed: int, vocab: int, is_v2: bool = False) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Return (config.json, weights) of unet, vae and text_encoder; the text encoder's names begin with
    "text_model."."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    ids = {"vocab_size": vocab, "bos_token_id": vocab - 2, "eos_token_id": vocab - 1, "pad_token_id": vocab - 1}
    unet_config, clip_config = (UNET_V2, CLIP_V2) if is_v2 else (UNET, CLIP)
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**unet_config), AutoencoderKL(**VAE)
        clip = CLIPTextModel(CLIPTextConfig(**clip_config, **ids))
    clip_state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in fixed_init(clip, seed + 2).items()}
    clip_json = {**clip_config, **ids, "architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    return {
        "unet": (json.loads(unet.to_json_string()), fixed_init(unet, seed)),
        "vae": (json.loads(vae.to_json_string()), fixed_init(vae, seed + 1)),
        "text_encoder": (clip_json, clip_state),
    }


def write_folder(folder: Path, parts: Parts) -> Path:
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    write_parts(folder, PIPELINE, parts)
    return folder


def ldm_tensors(states: dict[str, dict[str, Tensor]], is_v2: bool = False) -> dict[str, Tensor]:
    """Return the three state dicts in the single-file layout."""
    unet = {UNET_PREFIX + unet_to_ldm(name, UNET_LAYOUT): tensor for name, tensor in states["unet"].items()}
    text = to_open_clip(states["text_encoder"]) if is_v2 else states["text_encoder"]
    clip = {CLIP_PREFIXES["sd2" if is_v2 else "sd1"] + name: tensor for name, tensor in text.items()}
    return unet | clip | vae_tensors(states["vae"])


def vae_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the VAE in the single-file layout, where its attention is made of 1x1 convolutions."""
    vae = {}
    for name, tensor in state.items():
        is_projection = ".attentions." in name and tensor.ndim == 2
        key = VAE_PREFIX + vae_to_ldm(name, len(VAE["block_out_channels"]))  # type: ignore[arg-type]
        vae[key] = tensor[:, :, None, None] if is_projection else tensor
    return vae


def write_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> int:
    """Write CLIP's tokenizer with all bytes and a few words, so any caption encodes; return its vocabulary size."""
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = sorted(ByteLevel.alphabet())
    words = [*symbols, *(f"{s}</w>" for s in symbols), *(merge.replace(" ", "") for merge in MERGES)]
    vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = pad
    config = {**special, "model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return len(vocab)


def full_size_keys() -> dict[str, Any]:
    """Return facts about the full-size model.

    "checkpoint" {name: shape}, "diffusers" {part: {module path: name in the file}}, "lora" {key: shape at rank 4}.
    """
    facts: dict[str, Any] = json.loads(gzip.decompress(FULL_SIZE.read_bytes()))
    return facts


def write_full_size(folder: Path) -> list[str]:
    write_tokenizer(folder / "tokenizer")
    return write_headers(folder, {"pretrained_model_name_or_path": shapes_of(facts("sd15")["checkpoint"])})


def unet_values() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(42)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 7, UNET["cross_attention_dim"], generator=generator)  # type: ignore[call-overload]
    return latents, torch.tensor([17, 801]), text


def view_with_clip(encoders: Sequence[nn.Module], denoiser: nn.Module) -> Any:
    return assembly.view([*encoders, transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP))], denoiser)


def pair(base: str, config: Mapping[str, Any]) -> Pair:
    """Build a U-Net pair; both models are diffusers', with names derived for the tiny layout as for the full size."""
    ours, theirs = unets(config)
    generator = torch.Generator().manual_seed(8)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 9, config["cross_attention_dim"], generator=generator)
    names = BaseNames(base, tuple(unet_module(path, UNET_LAYOUT) for path, _ in layers_of(ours)))
    ours_and_theirs = [
        lambda model=model: model(latents, torch.tensor([31, 742]), text).sample for model in (ours, theirs)
    ]
    return Pair(names, ours, {"unet": theirs}, *ours_and_theirs)


def unets(config: Mapping[str, Any]) -> list[Any]:
    """Return two U-Nets of diffusers with the same weights."""
    models = []
    for _ in range(2):
        model: Any = diffusers.UNet2DConditionModel(**config)
        model.load_state_dict(fixed_init(model, 7))
        models.append(model.requires_grad_(False).eval())
    return models


CONVOLUTIONS = ["conv_dim=2", "conv_alpha=1", "use_tucker=True", "train_norm=True", "rank_dropout=0.1"]
SD1_UNET = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
SD1_FF = "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
SD1_ORIGINAL = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k"
CLIP_LAYER = "text_model.encoder.layers.{}.self_attn.q_proj"


def clips(make: Callable[[str, int], Shapes], prefix: str, width: int = 768) -> Shapes:
    """Return the adapter keys of seven modules of a text encoder."""
    shapes: Shapes = {}
    for layer in range(7):
        shapes |= make(prefix + CLIP_LAYER.format(layer), width)
    return shapes


# Every argument on the page that describes sd-scripts' options of an SD adapter, as in its examples.
PAGE = [
    "--mixed_precision", "bf16", "--optimizer_type", "adamw8bit", "--learning_rate", "1e-4",
    "--gradient_checkpointing", "--network_dim", "8", "--network_alpha", "4", "--network_args", "conv_dim=4",
    "conv_alpha=2", "loraplus_lr_ratio=4", "loraplus_unet_lr_ratio=3", "loraplus_text_encoder_lr_ratio=2",
    "rank_dropout=0.1", "module_dropout=0.1", "dora_wd=True", "use_tucker=True", "use_scalar=True", "train_norm=True",
]  # fmt: skip
BASES = (
    Base(
        name="sd",
        script="train_network",
        module="networks.lora",
        build=lambda folder: path_argument(build_tiny_sd(folder, 51)),
        spec_name="sd1",
        adapts_text_encoders=True,
        everything={"conv_dim": "4"},
        written=("sd_v1", "stable-diffusion-v1"),
        runs={
            "convolutions": ["--network_args", *CONVOLUTIONS],
            "blocks": [
                "--network_args", "down_lr_weight=cosine", "up_lr_weight=1,1,0,0,1,1,1,1,1,1,1,1", "mid_lr_weight=2",
            ],
            "lycoris": [
                "--network_module", "lycoris.kohya", "--network_args", "algo=lokr", "preset=attn-mlp", "factor=2",
            ],
            "page": PAGE,
            "page_blocks": [
                "--network_args", f"block_dims={','.join(['4'] * 25)}", f"block_alphas={','.join(['2'] * 25)}",
                f"conv_block_dims={','.join(['2'] * 25)}", f"conv_block_alphas={','.join(['1'] * 25)}",
            ],
            "page_dylora": ["--network_module", "networks.dylora", "--network_args", "dyloRA=2"],
        },
        blocks_to_swap="9",
        deep=Deep(
            lambda: diffusers.UNet2DConditionModel(**UNET),
            unet_values,
            view_with_clip,
            most_graphs=12,
            stacks=unet_stacks,
            run_blocks_with=run_unet_blocks_with,
        ),
        pairs={"sd1": partial(pair, "sd1", UNET)},
        merged=("networks.lora", {"conv_dim": "2", "train_norm": "True", "dora_wd": "True"}),
        full_size={"SD 1.5": (512, write_full_size)},
        readers=(
            ("kohya", "AAAAA", kohya(SD1_UNET) | clips(kohya, "text_encoder.")),
            ("generic", "ANNNS", peft(SD1_ORIGINAL) | clips(peft, "text_encoders.clip_l.transformer.")),
            ("generic without text encoder", "AANNA", peft(SD1_ORIGINAL)),
            ("mixed: generic U-Net, kohya text encoder", "AASNA", peft(SD1_ORIGINAL) | clips(kohya, "text_encoder.")),
            ("diffusers", "SNNAS", peft(SD1_UNET) | peft(SD1_FF) | clips(peft, "text_encoder.")),
        ),
    ),
    Base(
        name="sd2",
        script="train_network",
        module="networks.lora",
        build=lambda folder: path_argument(build_tiny_sd(folder, 52, is_v2=True), "--v2"),
        adapts_text_encoders=True,
        everything={"conv_dim": "4"},
        written=("sd_v2_v", "stable-diffusion-v2-768-v"),
        runs={"v": ["--v_parameterization", "--zero_terminal_snr", "--min_snr_gamma", "5"]},
        blocks_to_swap="9",
        pairs={"sd2": partial(pair, "sd2", UNET_V2)},
        readers=(
            ("sd2 kohya", "AAAAS", kohya(SD1_UNET, 1024) | clips(kohya, "text_encoder.", 1024)),
            ("sd2 diffusers", "SNNAS", peft(SD1_UNET, 1024) | clips(peft, "text_encoder.", 1024)),
        ),
    ),
)  # fmt: skip
