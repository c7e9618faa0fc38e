"""The options of Z-Image only, and musubi-tuner's names for them."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from library.options.base import Options, group, option, redeclared
from library.options.caching import TextCachingOptions
from library.options.machine.memory import ScaledPrecisionOptions
from library.options.model import ReadingOptions
from library.options.train import TrainOptions
from library.options.training.flow import (
    FlowPredictionOptions,
    FlowSamplingOptions,
    FlowWeightingOptions,
    TimestepPreviewOptions,
)

OptionsT = TypeVar("OptionsT", bound="ZImageOptions")
OWN_ATTENTION = "attention is torch's scaled dot product, which has flash attention of its own"


@dataclass(frozen=True)
class ZImageModelOptions(Options):
    """The parts of the base model."""

    dit: str | None = option(
        None,
        logged=False,
        help="The base model, as --pretrained_model_name_or_path, in musubi-tuner's words. As there, latents and text "
        "features are then cached in files.",
    )
    text_encoder: str | None = option(
        None, usual=True, help="File or folder of the text encoder Qwen3 4B. Unset takes it from the base."
    )
    fp8_llm: bool = option(False, help="Keep the text encoder Qwen3 in 8 bits.")
    model_version: str | None = option(
        None,
        usual=True,
        choices=("base", "turbo", "de-turbo"),
        help="Which Z-Image the base is: turbo is distilled, and previews take 8 steps without guidance. Unset looks "
        "for the word turbo in the name of the file or folder.",
    )
    flash_attn: bool = option(False, ignored=OWN_ATTENTION, help=f"Has no effect: {OWN_ATTENTION}.")
    sage_attn: bool = option(
        False,
        ignored="SageAttention cannot train; attention is torch's scaled dot product",
        help="Has no effect: SageAttention cannot train. Attention is PyTorch's scaled dot product.",
    )
    split_attn: bool = option(
        False,
        ignored="the samples of a batch share one call of attention",
        help="Has no effect: the samples of a batch share one call of attention.",
    )


@dataclass(frozen=True)
class ZImageSamplingOptions(FlowSamplingOptions):
    """Sampling of noise levels."""

    timestep_sampling: str = redeclared(FlowSamplingOptions, "timestep_sampling", "shift")
    discrete_flow_shift: float = redeclared(FlowSamplingOptions, "discrete_flow_shift", 2.0)


INSTEAD: Mapping[str, str] = {
    "dit_path": "use --pretrained_model_name_or_path",
    "training_shift": "use --discrete_flow_shift with --timestep_sampling shift",
    "guidance_scale": "the model is trained without guidance; use --l in a prompt line to guide a preview",
    "ae": "use --vae",
    "t5xxl": "use --text_encoder",
    "clip_l": "use --text_encoder",
    "qwen3": "use --text_encoder",
    "gemma2": "use --text_encoder",
    "byt5": "use --text_encoder",
    "fp8_vl": "use --fp8_llm",
    "split_mode": "use --blocks_to_swap",
    "gradient_checkpointing_cpu_offload": "use --cpu_offload_checkpointing",
    "use_pinned_memory_for_block_swap": "blocks are pinned where the system allows it",
    "block_swap_h2d_only": "frozen weights are never copied back",
    "dit_dtype": "use --mixed_precision",
    "vae_dtype": "use --no_half_vae for 32 bits",
    "use_32bit_attention": "use --mixed_precision no for 32 bits",
    "disable_numpy_memmap": "files are never mapped into memory",
}
"""Alternatives to options of other scripts and programs; they end the error for such an option."""


@dataclass(frozen=True)
class ZImageOptions(TrainOptions):
    """All options of zimage_train_network.py."""

    precision: ScaledPrecisionOptions = group(ScaledPrecisionOptions)
    zimage: ZImageModelOptions = group(ZImageModelOptions)
    text_caching: TextCachingOptions = group(TextCachingOptions)
    flow_sampling: ZImageSamplingOptions = group(ZImageSamplingOptions)
    flow_weighting: FlowWeightingOptions = group(FlowWeightingOptions)
    flow_prediction: FlowPredictionOptions = group(FlowPredictionOptions)
    timestep_preview: TimestepPreviewOptions = group(TimestepPreviewOptions)
    reading: ReadingOptions = group(ReadingOptions)

    @classmethod
    def from_args(cls: type[OptionsT], args: argparse.Namespace) -> OptionsT:
        """Collect the parsed values. The text encoder has no adapters, so only the denoiser is trained."""
        options = super().from_args(args)
        network = {"network_train_unet_only": not options.network.network_train_text_encoder_only}
        return options.with_values({**network, **from_dit(options)})


def from_dit(options: "ZImageOptions") -> dict[str, Any]:
    """Return what --dit stands for, by option; empty without it."""
    if options.zimage.dit is None:
        return {}
    caches = ("cache_latents", "cache_text_encoder_outputs")
    return {
        "pretrained_model_name_or_path": options.model.pretrained_model_name_or_path or options.zimage.dit,
        **{f"{name}{ending}": True for name in caches for ending in ("", "_to_disk")},
    }
