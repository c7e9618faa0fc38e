"""The options that only Lumina Image 2.0 has."""

from collections.abc import Mapping
from dataclasses import dataclass

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

TIMESTEP_SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "nextdit_shift", "flux_shift")


@dataclass(frozen=True)
class LuminaModelOptions(Options):
    """The parts of the base model and what reaches the denoiser of a caption."""

    gemma2: str | None = option(
        None, usual=True, help="File or folder of the text encoder Gemma 2. Unset takes it from the base."
    )
    ae: str | None = option(None, usual=True, help="File or folder of the VAE. Unset takes it from the base.")
    gemma2_max_token_length: int | None = option(
        None, at_least=2, help="Longest caption in Gemma's tokens; what is longer is cut. Unset is 256."
    )
    system_prompt: str = option(
        "",
        help="Instruction that is put before every caption and preview prompt, with the marker that the model was "
        "trained with between them. Empty captions and negative prompts have none.",
    )
    use_flash_attn: bool = option(
        False,
        ignored="attention is torch's scaled dot product, which has flash attention of its own",
        help="Has no effect: attention is PyTorch's scaled dot product, which has its own flash attention.",
    )
    use_sage_attn: bool = option(
        False,
        ignored="SageAttention cannot train; attention is torch's scaled dot product",
        help="Has no effect: SageAttention cannot train. Attention is PyTorch's scaled dot product.",
    )
    sample_batch_size: int | None = option(
        None,
        ignored="preview pictures are drawn one by one",
        help="Has no effect: preview pictures are drawn one by one, so that no picture depends on another.",
    )


@dataclass(frozen=True)
class LuminaSamplingOptions(FlowSamplingOptions):
    """How noise levels are drawn."""

    timestep_sampling: str = redeclared(
        FlowSamplingOptions,
        "timestep_sampling",
        "shift",
        choices=TIMESTEP_SAMPLINGS,
        help="How noise levels are drawn: sigma from a table by --weighting_scheme, uniform, sigmoid of a normal draw, "
        "shift as sigmoid with --discrete_flow_shift, flux_shift with a shift that grows with the picture, "
        "nextdit_shift as flux_shift from uniform draws.",
    )
    discrete_flow_shift: float = redeclared(FlowSamplingOptions, "discrete_flow_shift", 6.0)


INSTEAD: Mapping[str, str] = {
    "dit": "here it is --pretrained_model_name_or_path",
    "training_shift": "here it is --discrete_flow_shift with --timestep_sampling shift",
    "guidance_scale": "the model is trained without guidance; --l in the line of a prompt guides its preview",
    "t5xxl_max_token_length": "here it is --gemma2_max_token_length",
    "t5_max_token_length": "here it is --gemma2_max_token_length",
    "qwen3_max_token_length": "here it is --gemma2_max_token_length",
    "t5xxl": "here it is --gemma2",
    "clip_l": "here it is --gemma2",
    "qwen3": "here it is --gemma2",
    "text_encoder": "here it is --gemma2",
    "split_mode": "here it is --blocks_to_swap",
}
"""What options of other scripts and programs are here, as the error for one of them ends."""


@dataclass(frozen=True)
class LuminaOptions(TrainOptions):
    """All options of lumina_train_network.py."""

    lumina: LuminaModelOptions = group(LuminaModelOptions)
    text_caching: TextCachingOptions = group(TextCachingOptions)
    flow_sampling: LuminaSamplingOptions = group(LuminaSamplingOptions)
    flow_weighting: FlowWeightingOptions = group(FlowWeightingOptions)
    flow_prediction: FlowPredictionOptions = group(FlowPredictionOptions)
    timestep_preview: TimestepPreviewOptions = group(TimestepPreviewOptions)
    reading: ReadingOptions = group(ReadingOptions)
