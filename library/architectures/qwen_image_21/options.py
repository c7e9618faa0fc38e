"""The options of Qwen-Image 2.1 only, and musubi-tuner's names for them."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from library.options.base import Options, group, option, redeclared
from library.options.caching import TextCachingOptions
from library.options.dit import ALTERNATIVES, DitOptions, resolve_dit
from library.options.machine.memory import ScaledPrecisionOptions
from library.options.model import ReadingOptions
from library.options.train import TrainOptions
from library.options.training.flow import (
    FlowPredictionOptions,
    FlowSamplingOptions,
    FlowWeightingOptions,
    TimestepPreviewOptions,
)

OptionsT = TypeVar("OptionsT", bound="QwenImage21Options")


@dataclass(frozen=True)
class QwenImage21ModelOptions(Options):
    """The parts of the base model."""

    text_encoder: str | None = option(
        None, usual=True, help="File or folder of the text encoder Qwen3-VL 8B. Unset takes it from the base."
    )
    fp8_vl: bool = option(False, help="Keep the text encoder Qwen3-VL in 8 bits.")


@dataclass(frozen=True)
class QwenImage21SamplingOptions(FlowSamplingOptions):
    """Sampling of noise levels."""

    timestep_sampling: str = redeclared(FlowSamplingOptions, "timestep_sampling", "shift")


INSTEAD: Mapping[str, str] = {
    **ALTERNATIVES,
    "guidance_scale": "the model is trained without guidance; use --l in a prompt line to guide a preview",
    "fp8_llm": "use --fp8_vl",
    "fp8_text_encoder": "use --fp8_vl",
    "model_version": "there is one Qwen-Image 2.1; remove it",
    "dit_config": "sizes are read from the file; remove it",
}
"""Alternatives to options of other scripts and programs; they end the error for such an option."""


@dataclass(frozen=True)
class QwenImage21Options(TrainOptions):
    """All options of qwen_image_21_train_network.py."""

    precision: ScaledPrecisionOptions = group(ScaledPrecisionOptions)
    dit: DitOptions = group(DitOptions)
    qwen_image_21: QwenImage21ModelOptions = group(QwenImage21ModelOptions)
    text_caching: TextCachingOptions = group(TextCachingOptions)
    flow_sampling: QwenImage21SamplingOptions = group(QwenImage21SamplingOptions)
    flow_weighting: FlowWeightingOptions = group(FlowWeightingOptions)
    flow_prediction: FlowPredictionOptions = group(FlowPredictionOptions)
    timestep_preview: TimestepPreviewOptions = group(TimestepPreviewOptions)
    reading: ReadingOptions = group(ReadingOptions)

    @classmethod
    def from_args(cls: type[OptionsT], args: argparse.Namespace) -> OptionsT:
        """Collect the parsed values and resolve `dit`."""
        options = super().from_args(args)
        return resolve_dit(options, options.dit.dit)
