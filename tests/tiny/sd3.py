"""Tiny but complete Stable Diffusion 3 models."""

import gzip
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.architectures.sd3.layers import NAMES, view
from library.architectures.sd3.load import DENOISER_PREFIX, TEXT_PREFIXES
from library.architectures.sd3.model import MMDiT, MMDiTConfig
from library.models.vae.checkpoint_keys import VAE_PREFIX, vae_to_ldm
from tests.contracts.full_size import facts
from tests.tiny.base import Base, Deep, InDiffusers, Pair, path_argument
from tests.tiny.flux import write_t5_tokenizer
from tests.tiny.headers import shapes_of, write_headers
from tests.tiny.init import fixed_init
from tests.tiny.keys import kohya, peft
from tests.tiny.sd import write_tokenizer

FULL_SIZE = Path(__file__).parents[1] / "contracts" / "data" / "sd3.json.gz"

PLAIN = MMDiTConfig(
    width=64,
    depth=2,
    head_width=64,
    mlp_width=256,
    patch=2,
    in_channels=16,
    context_width=96,
    pooled_width=48,
    positions_side=24,
    norms_queries=False,
    dual_attention=frozenset(),
)
"""Like SD3 medium: heads of width 64, no query norms."""

NORMED = MMDiTConfig(**{**vars(PLAIN), "head_width": 16, "norms_queries": True, "depth": 3})
"""Like SD3.5 large."""

DUAL = MMDiTConfig(**{**vars(NORMED), "dual_attention": frozenset({0, 1}), "positions_side": 32})
"""Like SD3.5 medium: the first blocks have dual attention."""

CONFIGS = {"sd3-medium": PLAIN, "sd3.5-large": NORMED, "sd3.5-medium": DUAL}


def mmdit_weights(config: MMDiTConfig, seed: int) -> dict[str, Tensor]:
    """Return weights of the denoiser under its own names; position embeddings have the scale of cosines."""
    with torch.device("meta"):
        model = MMDiT(config)
    weights = fixed_init(model, seed)
    shape = weights["pos_embed"].shape
    weights["pos_embed"] = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.7
    return weights


def diffusers_mmdit(config: MMDiTConfig, weights: dict[str, Tensor]) -> Any:
    """Return diffusers' SD3Transformer2DModel with our weights, loaded by its own reader of original checkpoints.

    Its MLP is always four times as wide as the model.
    """
    from diffusers import SD3Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=config.patch,
        in_channels=config.in_channels,
        num_layers=config.depth,
        attention_head_dim=config.head_width,
        num_attention_heads=config.width // config.head_width,
        joint_attention_dim=config.context_width,
        caption_projection_dim=config.width,
        pooled_projection_dim=config.pooled_width,
        out_channels=config.in_channels,
        pos_embed_max_size=config.positions_side,
        dual_attention_layers=tuple(config.dual_attention),
        qk_norm="rms_norm" if config.norms_queries else None,
    )
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}
    model.load_state_dict(convert_sd3_transformer_checkpoint_to_diffusers(prefixed))
    return model.requires_grad_(False).eval()


def tiny_mmdit(config: MMDiTConfig, seed: int) -> MMDiT:
    """Return a frozen denoiser in float32."""
    with torch.device("meta"):
        model = MMDiT(config)
    model.load_state_dict(mmdit_weights(config, seed), assign=True)
    return model.requires_grad_(False).eval()


def full_size_keys() -> dict[str, Any]:
    """Return facts about the full-size models.

    "mmdit" {model: {name in the denoiser: shape}}; "parts" {vae, clip_l, clip_g, t5xxl: {name: shape}}; "lora" {model:
    {"default": {key: shape at rank 4}, "variants": {words: network_args, call, num_keys, added, removed, changed}}}.
    """
    facts: dict[str, Any] = json.loads(gzip.decompress(FULL_SIZE.read_bytes()))
    return facts


CLIPS = {
    "clip_l": {"hidden_size": 16, "num_hidden_layers": 3, "hidden_act": "quick_gelu", "projection_dim": 16},
    "clip_g": {"hidden_size": 32, "num_hidden_layers": 4, "hidden_act": "gelu", "projection_dim": 32},
}
T5 = {
    "d_model": 96,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 8,
}
VAE = {
    "block_out_channels": (8, 8, 16, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 16,
    "norm_num_groups": 8,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def build_tiny_sd3(
    folder: Path, seed: int, name: str = "sd3-medium", with_text: bool = True, config: MMDiTConfig | None = None
) -> Path:
    """Write a tiny model of the size `name` of CONFIGS, or `config`, as a combined single file, and return its path.

    Next to it are tokenizer/, tokenizer_3/ (T5's) and the separate files clip_l, clip_g, t5xxl and vae. `with_text`
    also puts the text encoders into the single file. Images of 64 px have 8x8 latents.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    modules = text_modules(write_tokenizer(folder / "tokenizer"), write_t5_tokenizer(folder / "tokenizer_3"))
    parts = {part: module_weights(module, seed + 1 + i) for i, (part, module) in enumerate(modules.items())}
    parts["vae"] = ldm_vae(seed + 9)
    for part, state in parts.items():
        save_file(state, folder / f"{part}.safetensors")
    tensors = {DENOISER_PREFIX + key: tensor for key, tensor in mmdit_weights(config or CONFIGS[name], seed).items()}
    tensors |= {VAE_PREFIX + key: tensor for key, tensor in parts["vae"].items()}
    if with_text:
        for part, prefix in TEXT_PREFIXES.items():
            tensors |= {prefix + key: tensor for key, tensor in parts[part].items()}
    path = folder / f"tiny_{name}.safetensors"
    save_file(tensors, path)
    return path


def text_modules(vocab: int, t5_vocab: int) -> dict[str, nn.Module]:
    """Return clip_l, clip_g and t5xxl on the meta device."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    ids = {"vocab_size": vocab, "bos_token_id": vocab - 2, "eos_token_id": vocab - 1, "pad_token_id": vocab - 1}
    with torch.device("meta"):
        modules: dict[str, nn.Module] = {
            name: CLIPTextModelWithProjection(
                CLIPTextConfig(**ids, **sizes, num_attention_heads=1, intermediate_size=2 * sizes["hidden_size"])
            )
            for name, sizes in CLIPS.items()
        }
        modules["t5xxl"] = T5EncoderModel(T5Config(vocab_size=t5_vocab, **T5))
    return modules


def module_weights(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return weights under the names of published files: CLIP's begin with "text_model.", T5's word embeddings occur
    once."""
    weights = fixed_init(module, seed)
    if "shared.weight" in weights:
        return {name: tensor for name, tensor in weights.items() if name != "encoder.embed_tokens.weight"}
    return {name if name.startswith("text_") else f"text_model.{name}": tensor for name, tensor in weights.items()}


def ldm_vae(seed: int) -> dict[str, Tensor]:
    """Return the VAE in Stability's layout, where its attention is made of 1x1 convolutions."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL(**VAE)
    tensors = {}
    for name, tensor in fixed_init(vae, seed).items():
        is_projection = ".attentions." in name and tensor.ndim == 2
        tensors[vae_to_ldm(name, 4)] = tensor[:, :, None, None] if is_projection else tensor
    return tensors


# Its inputs, and the output of diffusers' transformer


def inputs(config: MMDiTConfig, size: tuple[int, int], seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(2, config.in_channels, *size, generator=g).requires_grad_(),
        "timesteps": torch.tensor([37.0, 912.0]),
        "context": torch.randn(2, 9, config.context_width, generator=g).requires_grad_(),
        "pooled": torch.randn(2, config.pooled_width, generator=g).requires_grad_(),
    }


def run_ours(model: MMDiT, values: dict[str, Tensor]) -> Tensor:
    velocity: Tensor = model(values["latents"], values["timesteps"], values["context"], values["pooled"])
    return velocity


def run_theirs(model: Any, values: dict[str, Tensor]) -> Tensor:
    velocity: Tensor = model(
        hidden_states=values["latents"],
        timestep=values["timesteps"],
        encoder_hidden_states=values["context"],
        pooled_projections=values["pooled"],
    ).sample
    return velocity


def write_full_size(folder: Path) -> list[str]:
    inventory = facts("sd3")
    write_tokenizer(folder / "tokenizer")
    write_t5_tokenizer(folder / "tokenizer_3")
    denoiser = shapes_of(inventory["mmdit"]["sd3-medium"], "model.diffusion_model.")
    shapes = {"pretrained_model_name_or_path": denoiser | shapes_of(inventory["parts"]["vae"])}
    shapes |= {part: shapes_of(inventory["parts"][part]) for part in ("clip_l", "clip_g", "t5xxl")}
    return write_headers(folder, shapes)


def diffusers_models() -> dict[str, nn.Module]:
    from diffusers import SD3Transformer2DModel

    sizes = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
    return {"transformer": SD3Transformer2DModel(sample_size=128, pos_embed_max_size=192, **sizes)}


def pair(size: str) -> Pair:
    config = CONFIGS[size]
    ours, theirs = tiny_mmdit(config, 7), diffusers_mmdit(config, mmdit_weights(config, 7))
    values = {name: value.detach() for name, value in inputs(config, (16, 12), 6).items()}
    return Pair(
        NAMES, ours, {"transformer": theirs}, lambda: run_ours(ours, values), lambda: run_theirs(theirs, values)
    )


CONFIG = PLAIN
BASES = (
    Base(
        name="sd3",
        script="sd3_train_network",
        module="networks.lora_sd3",
        build=lambda folder: path_argument(build_tiny_sd3(folder, 55, config=CONFIG), "--t5xxl_max_token_length", "16"),
        adapts_text_encoders=True,
        unused="context_block",
        everything={"split_qkv": "True", "emb_dims": "[2,2,2,2,2,2]"},
        written=("medium", "stable-diffusion-3-medium"),
        deeper={"depth": 6},
        offset_words=("--weighting_scheme", "logit_normal", "--logit_std", "1.4", "--training_shift", "2"),
        offset_factor=1.4,
        deep=Deep(
            lambda: MMDiT(replace(PLAIN, depth=6)),
            lambda: tuple(value.detach() for value in inputs(PLAIN, (8, 6), seed=45).values()),
            view,
            most_graphs=4,
        ),
        pairs={size: partial(pair, size) for size in CONFIGS},
        verified={f"sd3 {name}": partial(tiny_mmdit, config, 65) for name, config in CONFIGS.items()},
        merged=("networks.loha", {}),
        full_size={"SD3 medium": (1024, write_full_size)},
        readers=(
            ("sd3 kohya", "AANNN", kohya("unet.joint_blocks.0.x_block_attn_qkv", 1536)),
            ("sd3 generic", "AANNA", peft("diffusion_model.joint_blocks.0.x_block.attn.qkv", 1536)),
            ("sd3 diffusers", "ANNAA", peft("transformer.transformer_blocks.0.attn.to_q", 1536)),
        ),
        listing=lambda: full_size_keys()["lora"]["sd3-medium"],
        in_diffusers=InDiffusers(
            diffusers_models,
            "SD3LoraLoaderMixin",
            ("default", "emb_dims=[5,6,7,8,9,10]", "train_t5xxl=True", "network_train_text_encoder_only"),
            clip_widths=(768, 1280),
        ),
        in_comfyui="emb_dims=[5,6,7,8,9,10]",
    ),
)
