"""The options that only FLUX.1 and Chroma have."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from library.options.base import Options, group, option, redeclared
from library.options.caching import TextCachingOptions
from library.options.model import ReadingOptions
from library.options.train import TrainOptions
from library.options.training.flow import (
    FlowPredictionOptions,
    FlowSamplingOptions,
    FlowWeightingOptions,
    TimestepPreviewOptions,
)

OptionsT = TypeVar("OptionsT", bound="FluxOptions")

SPLIT_MODE_BLOCKS = 18  # that wait with --split_mode


@dataclass(frozen=True)
class FluxModelOptions(Options):
    """The parts of the base model and what reaches the denoiser of a caption."""

    clip_l: str | None = option(
        None,
        usual=True,
        help="File or folder of the text encoder CLIP-L. Unset takes it from the base. Chroma has none.",
    )
    t5xxl: str | None = option(
        None, usual=True, help="File or folder of the text encoder T5-XXL. Unset takes it from the base."
    )
    ae: str | None = option(None, usual=True, help="File or folder of the VAE. Unset takes it from the base.")
    controlnet_model_name_or_path: str | None = option(
        None,
        ignored="adapters are trained without a ControlNet",
        help="Has no effect: adapters are trained without one.",
    )
    t5xxl_max_token_length: int | None = option(
        None,
        at_least=2,
        help="Longest caption in T5's tokens; what is longer is cut. Unset is 256 for schnell and 512 otherwise.",
    )
    apply_t5_attn_mask: bool = option(
        False, help="Keep T5 and the denoiser from attending to the padding behind a caption. Always on for Chroma."
    )
    guidance_scale: float = option(
        3.5,
        usual=True,
        help="Strength of guidance that the denoiser is told while it trains; schnell has no such input. 1 is what "
        "most recipes train FLUX.1 with; Chroma was made with 0.",
    )
    model_type: str = option(
        "flux", help="Which model the base is: flux for FLUX.1 dev and schnell.", choices=("flux", "chroma")
    )
    split_mode: bool = option(
        False, unless="blocks_to_swap", affects_training=False, help="An old name for --blocks_to_swap 18."
    )


@dataclass(frozen=True)
class FluxPredictionOptions(FlowPredictionOptions):
    """The form in which the denoiser's output is compared with the target."""

    model_prediction_type: str = redeclared(FlowPredictionOptions, "model_prediction_type", "sigma_scaled")


INSTEAD: Mapping[str, str] = {
    "dit": "here it is --pretrained_model_name_or_path",
    "training_shift": "here it is --discrete_flow_shift with --timestep_sampling shift",
    "clip_g": "the model has CLIP-L and T5 alone",
    "apply_lg_attn_mask": "CLIP-L gives one vector here, which needs no mask",
    "t5_max_token_length": "here it is --t5xxl_max_token_length",
    "text_encoder": "here they are --clip_l and --t5xxl",
    "qwen3": "here it is --t5xxl",
    "gemma2": "here it is --t5xxl",
    "sample_batch_size": "previews are drawn one by one",
}
"""What options of other scripts and programs are here, as the error for one of them ends."""


@dataclass(frozen=True)
class FluxOptions(TrainOptions):
    """All options of flux_train_network.py."""

    flux: FluxModelOptions = group(FluxModelOptions)
    text_caching: TextCachingOptions = group(TextCachingOptions)
    flow_sampling: FlowSamplingOptions = group(FlowSamplingOptions)
    flow_weighting: FlowWeightingOptions = group(FlowWeightingOptions)
    flow_prediction: FluxPredictionOptions = group(FluxPredictionOptions)
    timestep_preview: TimestepPreviewOptions = group(TimestepPreviewOptions)
    reading: ReadingOptions = group(ReadingOptions)

    @classmethod
    def from_args(cls: type[OptionsT], args: argparse.Namespace) -> OptionsT:
        """Collect the parsed values; --split_mode becomes what it stands for."""
        options = super().from_args(args)
        if not options.flux.split_mode or options.memory.blocks_to_swap is not None:
            return options
        return options.with_values({"blocks_to_swap": SPLIT_MODE_BLOCKS, "split_mode": False})
