"""musubi-tuner's option names, for the base models that it also trains."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from library.options.base import Options, group, option
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

OWN_ATTENTION = "attention is torch's scaled dot product, which has flash attention of its own"
OptionsT = TypeVar("OptionsT", bound="DitTrainOptions")


@dataclass(frozen=True)
class DitOptions(Options):
    """The base model and attention in musubi-tuner's words."""

    dit: str | None = option(
        None,
        logged=False,
        help="The base model, as --pretrained_model_name_or_path, in musubi-tuner's words. As there, latents and text "
        "features are then cached in files.",
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


ALTERNATIVES: Mapping[str, str] = {
    "dit_path": "use --pretrained_model_name_or_path",
    "training_shift": "use --discrete_flow_shift with --timestep_sampling shift",
    "ae": "use --vae",
    **dict.fromkeys(("t5xxl", "clip_l", "qwen3", "gemma2", "byt5"), "use --text_encoder"),
    "split_mode": "use --blocks_to_swap",
    "gradient_checkpointing_cpu_offload": "use --cpu_offload_checkpointing",
    "dit_dtype": "use --mixed_precision",
    "vae_dtype": "use --no_half_vae for 32 bits",
    "use_32bit_attention": "use --mixed_precision no for 32 bits",
    "disable_numpy_memmap": "files are never mapped into memory",
}
"""Replacements for options of other scripts and programs, appended to the error for such an option."""


@dataclass(frozen=True)
class PartOptions(Options):
    """The parts of the base model."""

    text_encoder: str | None = option(
        None, usual=True, help="File or folder of the text encoder. Unset takes it from the base."
    )


@dataclass(frozen=True)
class DitTrainOptions(TrainOptions):
    """The options of a base model that musubi-tuner also trains. Subclasses declare their own `parts` and
    `flow_sampling`."""

    precision: ScaledPrecisionOptions = group(ScaledPrecisionOptions)
    dit: DitOptions = group(DitOptions)
    parts: PartOptions = group(PartOptions)
    text_caching: TextCachingOptions = group(TextCachingOptions)
    flow_sampling: FlowSamplingOptions = group(FlowSamplingOptions)
    flow_weighting: FlowWeightingOptions = group(FlowWeightingOptions)
    flow_prediction: FlowPredictionOptions = group(FlowPredictionOptions)
    timestep_preview: TimestepPreviewOptions = group(TimestepPreviewOptions)
    reading: ReadingOptions = group(ReadingOptions)

    @classmethod
    def from_args(cls: type[OptionsT], args: argparse.Namespace) -> OptionsT:
        """Build the options from parsed arguments, and apply `dit`."""
        options = super().from_args(args)
        return resolve_dit(options, options.dit.dit)


def resolve_dit(options: OptionsT, dit: str | None) -> OptionsT:
    """Apply --dit. Train only the denoiser, because the text encoders of these models do not support adapters."""
    values: dict[str, object] = {"network_train_unet_only": not options.network.network_train_text_encoder_only}
    if dit is not None:
        caches = ("cache_latents", "cache_text_encoder_outputs")
        values["pretrained_model_name_or_path"] = options.model.pretrained_model_name_or_path or dit
        values |= {f"{name}{ending}": True for name in caches for ending in ("", "_to_disk")}
    return options.with_values(values)
