"""The options specific to HunyuanImage 2.1."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.options.base import Options, group, option, redeclare
from library.options.caching import TextCachingOptions
from library.options.kinds import whole
from library.options.machine.memory import ATTENTION_MODES, ScaledPrecisionOptions
from library.options.model import BASE, ModelFile, ReadingOptions, part
from library.options.train import TrainOptions
from library.options.training.flow import (
    FlowPredictionOptions,
    FlowSamplingOptions,
    FlowWeightingOptions,
    TimestepPreviewOptions,
)
from library.options.training.network import train_denoiser_alone


@dataclass(frozen=True)
class HunyuanImageModelOptions(Options):
    """The parts of the base model and their execution."""

    text_encoder: str | None = part("the text encoder Qwen2.5-VL", "a base in diffusers' layout")
    byt5: str | None = option(
        None,
        path="part",
        usual=True,
        help="File or folder of ByT5, which reads text to be rendered in an image. Unset takes it from a base in "
        "diffusers' layout.",
    )
    fp8_vl: bool = option(False, help="Keep the text encoder Qwen2.5-VL in 8 bits.")
    vae_chunk_size: int | None = option(
        None,
        kind=whole(0),
        help="Compute the convolutions of the VAE for this many rows at a time, which saves GPU memory.",
    )
    attn_mode: str | None = option(
        None,
        help="Attention implementation. Always PyTorch's own, which torch and sdpa select.",
        choices=ATTENTION_MODES,
    )
    split_attn: bool = option(
        False,
        ignored="the samples of a batch share one call of attention",
        help="Has no effect: the samples of a batch share one call of attention.",
    )


@dataclass(frozen=True)
class HunyuanImageSamplingOptions(FlowSamplingOptions):
    """Sampling of noise levels."""

    discrete_flow_shift: float = redeclare(FlowSamplingOptions, "discrete_flow_shift", 5.0)


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
    "dit": "use --pretrained_model_name_or_path",
    "training_shift": "use --discrete_flow_shift with --timestep_sampling shift",
    "guidance_scale": "the model is trained without guidance; use --l in a prompt line to guide a preview",
    "ae": "use --vae",
    **dict.fromkeys(("t5xxl", "clip_l"), "use --text_encoder and --byt5"),
    **dict.fromkeys(("qwen3", "gemma2"), "use --text_encoder"),
    "split_mode": "use --blocks_to_swap",
}


@dataclass(frozen=True)
class HunyuanImageOptions(TrainOptions):
    """All options of hunyuan_image_train_network.py."""

    precision: ScaledPrecisionOptions = group(ScaledPrecisionOptions)
    hunyuan_image: HunyuanImageModelOptions = group(HunyuanImageModelOptions)
    text_caching: TextCachingOptions = group(TextCachingOptions)
    flow_sampling: HunyuanImageSamplingOptions = group(HunyuanImageSamplingOptions)
    flow_weighting: FlowWeightingOptions = group(FlowWeightingOptions)
    flow_prediction: FlowPredictionOptions = group(FlowPredictionOptions)
    timestep_preview: TimestepPreviewOptions = group(TimestepPreviewOptions)
    reading: ReadingOptions = group(ReadingOptions)

    def implied(self) -> Mapping[str, Any]:
        """Train only the denoiser, because the text encoders have no adapters."""
        return train_denoiser_alone(self.network)
