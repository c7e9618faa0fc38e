"""The options specific to HunyuanImage 2.1."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.options.base import group, option, without_effect
from library.options.flow_model import (
    FLOW_INSTEAD,
    ONE_CALL_OF_ATTENTION,
    SD_SCRIPTS_INSTEAD,
    FlowTrainOptions,
    PartsOptions,
)
from library.options.kinds import whole
from library.options.machine.memory import ATTENTION_MODES, ScaledPrecisionOptions
from library.options.model import BASE, ModelFile, part
from library.options.training.flow import FlowSamplingOptions
from library.options.training.network import train_denoiser_alone


@dataclass(frozen=True)
class HunyuanImageModelOptions(PartsOptions):
    """The parts of the base model and their execution."""

    text_encoder: str | None = part("the text encoder Qwen2.5-VL", "a base in diffusers' layout")
    byt5: str | None = option(None, path="part", usual=True)
    """File or folder of ByT5, which reads text to be rendered in an image. Unset takes it from a base in diffusers'
    layout."""
    fp8_vl: bool = option(False)
    """Keep the text encoder Qwen2.5-VL in 8 bits."""
    vae_chunk_size: int | None = option(None, kind=whole(0))
    """Compute the convolutions of the VAE for this many rows at a time, which saves GPU memory."""
    attn_mode: str | None = option(None, choices=ATTENTION_MODES)
    """Attention implementation. Always PyTorch's own, which torch and sdpa select."""
    split_attn: bool = without_effect(False, ONE_CALL_OF_ATTENTION)


FILES: tuple[ModelFile, ...] = (
    ModelFile(
        BASE,
        "Comfy-Org/HunyuanImage_2.1_ComfyUI",
        "hunyuanimage2.1_bf16.safetensors",
        34.9,
        "Tencent Hunyuan Community",
    ),
    ModelFile("text_encoder", "Comfy-Org/Qwen-Image_ComfyUI", "qwen_2.5_vl_7b.safetensors", 16.6, "Apache-2.0"),
    ModelFile("byt5", "Comfy-Org/HunyuanImage_2.1_ComfyUI", "byt5_small_glyphxl_fp16.safetensors", 0.44),
    ModelFile(
        "vae",
        "Comfy-Org/HunyuanImage_2.1_ComfyUI",
        "hunyuan_image_2.1_vae_fp16.safetensors",
        0.81,
        "Tencent Hunyuan Community",
    ),
)

PARTS = "--text_encoder qwen_2.5_vl.safetensors --byt5 byt5.safetensors --vae vae.safetensors"

INSTEAD: Mapping[str, str] = {
    **FLOW_INSTEAD,
    **SD_SCRIPTS_INSTEAD,
    "ae": "use --vae",
    **dict.fromkeys(("t5xxl", "clip_l"), "use --text_encoder and --byt5"),
    **dict.fromkeys(("qwen3", "gemma2"), "use --text_encoder"),
}


@dataclass(frozen=True)
class HunyuanImageOptions(FlowTrainOptions):
    """All options of hunyuan_image_train_network.py."""

    precision: ScaledPrecisionOptions = group(ScaledPrecisionOptions)
    parts: HunyuanImageModelOptions = group(HunyuanImageModelOptions)
    flow_sampling: FlowSamplingOptions = group(FlowSamplingOptions, discrete_flow_shift=5.0)

    def implied(self) -> Mapping[str, Any]:
        """Train only the denoiser, because the text encoders have no adapters."""
        return train_denoiser_alone(self.network)
