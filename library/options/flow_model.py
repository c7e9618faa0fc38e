"""The options that the scripts of flow models share."""

from collections.abc import Mapping
from dataclasses import dataclass

from library.options.base import Options, group
from library.options.caching import TextCachingOptions
from library.options.model import ReadingOptions
from library.options.train import TrainOptions
from library.options.training.flow import (
    FlowPredictionOptions,
    FlowSamplingOptions,
    FlowWeightingOptions,
    TimestepPreviewOptions,
)

FLOW_INSTEAD: Mapping[str, str] = {"training_shift": "use --discrete_flow_shift with --timestep_sampling shift"}
SD_SCRIPTS_INSTEAD: Mapping[str, str] = {
    "split_mode": "use --blocks_to_swap",
    "dit": "use --pretrained_model_name_or_path",
    "guidance_scale": "the model is trained without guidance; use --l in a prompt line to guide a preview",
}
"""Replacements for options of other scripts, appended to the error for such an option."""

NO_SAGE_ATTENTION = (  # reason and help
    "SageAttention cannot train; attention is torch's scaled dot product",
    "Has no effect: SageAttention cannot train. Attention is PyTorch's scaled dot product.",
)
ONE_CALL_OF_ATTENTION = "the samples of a batch share one call of attention"


@dataclass(frozen=True)
class PartsOptions(Options):
    """The parts of a base model: base class of those that name files."""


@dataclass(frozen=True)
class FlowOptions(Options):
    """The groups of a flow model whose parts are in several files. Base models declare their own `parts`, and the
    groups whose defaults differ."""

    parts: PartsOptions = group(PartsOptions)
    text_caching: TextCachingOptions = group(TextCachingOptions)
    flow_sampling: FlowSamplingOptions = group(FlowSamplingOptions)
    flow_weighting: FlowWeightingOptions = group(FlowWeightingOptions)
    flow_prediction: FlowPredictionOptions = group(FlowPredictionOptions)
    timestep_preview: TimestepPreviewOptions = group(TimestepPreviewOptions)
    reading: ReadingOptions = group(ReadingOptions)


@dataclass(frozen=True)
class FlowTrainOptions(FlowOptions, TrainOptions):
    """The options of a flow model that sd-scripts also trains."""
