"""The options specific to Anima."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.options.base import Options, group, option, without_effect
from library.options.caching import TextCachingOptions
from library.options.flow_model import FLOW_INSTEAD, SD_SCRIPTS_INSTEAD
from library.options.kinds import whole
from library.options.machine.memory import ATTENTION_MODES
from library.options.model import BASE, ModelFile, ReadingOptions
from library.options.train import TrainOptions
from library.options.training.flow import FlowSamplingOptions, FlowWeightingOptions, TimestepPreviewOptions


def rate_of(part: str) -> Any:
    """Declare the learning rate of a part of the model."""
    return without_effect(
        None,
        "it is for full fine-tuning; set rates of adapters with --network_args network_reg_lrs",
        f"Has no effect: it is for full fine-tuning; adapters use network_reg_lrs. Learning rate of {part}.",
    )


@dataclass(frozen=True)
class AnimaTextOptions(Options):
    """The text encoder and token limits."""

    qwen3: str | None = option(None, path="part", usual=True)
    """File or folder of the text encoder Qwen3 0.6B."""
    llm_adapter_path: str | None = option(None, path="file")
    """File with a text adapter (llm_adapter) that replaces the base model's."""
    t5_tokenizer_path: str | None = option(None, path="folder")
    """Folder of T5's tokenizer. Unset looks for t5_tokenizer next to the text encoder and the base model, then in
    --tokenizer_cache_dir, then on the hub."""
    qwen3_max_token_length: int = option(512, kind=whole(1))
    """Longest caption in Qwen3's tokens; longer captions are cut."""
    t5_max_token_length: int = option(512, kind=whole(2))
    """Longest caption in T5's tokens; longer captions are cut."""


@dataclass(frozen=True)
class AnimaRateOptions(Options):
    """Learning rates of parts of the model, for full fine-tuning only."""

    llm_adapter_lr: float | None = rate_of("the text adapter")
    self_attn_lr: float | None = rate_of("self-attention")
    cross_attn_lr: float | None = rate_of("cross-attention to the text")
    mlp_lr: float | None = rate_of("the MLPs")
    mod_lr: float | None = rate_of("the modulation")


@dataclass(frozen=True)
class AnimaMemoryOptions(Options):
    """Memory and kernels of the models."""

    attn_mode: str | None = option(None, choices=ATTENTION_MODES)
    """Attention implementation of the denoiser. Always PyTorch's own, which torch and sdpa select; other values only
    log a warning."""
    split_attn: bool = without_effect(
        False,
        "torch's attention needs no more memory for several images",
        "Attend to one image at a time. Has no effect: PyTorch's attention needs no more memory for several.",
    )
    vae_chunk_size: int | None = option(None, kind=whole(0), ignored="the VAE processes images whole")
    """Pixels that the VAE processes at a time. Has no effect: it processes images whole."""
    qwen_image_vae_2d: bool = option(False)
    """Compute the VAE's convolutions over time in two dimensions, which suffices for images and takes less time and
    memory. Latents are the same up to rounding, and caches are valid both ways."""
    vae_disable_cache: bool = without_effect(
        False,
        "an image has one frame, so the VAE caches nothing",
        "Do not cache earlier frames in the VAE. Has no effect: an image has one frame.",
    )


FILES: tuple[ModelFile, ...] = (
    ModelFile(BASE, "circlestone-labs/Anima", "anima-preview.safetensors", 4.2, "CircleStone non-commercial"),
    ModelFile("qwen3", "circlestone-labs/Anima", "qwen_3_06b_base.safetensors", 1.2),
    ModelFile("vae", "circlestone-labs/Anima", "qwen_image_vae.safetensors", 0.25),
)

PARTS = "--qwen3 qwen3.safetensors --vae vae.safetensors"

INSTEAD: Mapping[str, str] = {
    **FLOW_INSTEAD,
    **SD_SCRIPTS_INSTEAD,
    "model_prediction_type": "the model has only one prediction type, equal to raw",
    "ae": "use --vae",
    "t5xxl_max_token_length": "use --t5_max_token_length",
    **dict.fromkeys(("t5xxl", "clip_l", "gemma2", "text_encoder"), "use --qwen3"),
    "gemma2_max_token_length": "use --qwen3_max_token_length",
}


@dataclass(frozen=True)
class AnimaOptions(TrainOptions):
    """All options of anima_train_network.py."""

    text: AnimaTextOptions = group(AnimaTextOptions)
    text_caching: TextCachingOptions = group(TextCachingOptions)
    rates: AnimaRateOptions = group(AnimaRateOptions)
    flow_sampling: FlowSamplingOptions = group(
        FlowSamplingOptions, timestep_sampling="sigmoid", discrete_flow_shift=1.0
    )
    flow_weighting: FlowWeightingOptions = group(FlowWeightingOptions)
    computing: AnimaMemoryOptions = group(AnimaMemoryOptions)
    timestep_preview: TimestepPreviewOptions = group(TimestepPreviewOptions)
    reading: ReadingOptions = group(ReadingOptions)
