"""The options that only Lumina Image 2.0 has."""

from dataclasses import dataclass

from library.options.base import Options, group, option, redeclared
from library.options.caching import TextCachingOptions
from library.options.flow import (
    FlowPredictionOptions,
    FlowSamplingOptions,
    FlowWeightingOptions,
    TimestepPreviewOptions,
)
from library.options.model import ReadingOptions
from library.options.train import TrainOptions

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
        False, help="Has no effect: attention is PyTorch's scaled dot product, which has its own flash attention."
    )
    use_sage_attn: bool = option(
        False, help="Has no effect: SageAttention cannot train. Attention is PyTorch's scaled dot product."
    )
    sample_batch_size: int | None = option(
        None, help="Has no effect: preview pictures are drawn one by one, so that no picture depends on another."
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
