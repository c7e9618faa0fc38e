"""The options of diffusers_train_network.py."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from library.options.base import Options, group, option, redeclare
from library.options.caching import TextCachingOptions
from library.options.machine.memory import ScaledPrecisionOptions
from library.options.train import TrainOptions
from library.options.training.flow import TIMESTEP_SAMPLINGS, FlowSamplingOptions, FlowWeightingOptions
from library.options.training.network import train_denoiser_alone

SCRIPT = "diffusers_train_network.py"


@dataclass(frozen=True)
class TrustOptions(Options):
    """Code that a model brings."""

    trust_remote_code: bool = option(False)
    """Run Python code that comes with the model, for classes that diffusers and transformers do not have. It has all
    rights that you have, so read it first."""


@dataclass(frozen=True)
class ExpertOptions(Options):
    """The denoiser to train of a model that has two."""

    expert: str | None = option(None, choices=("high", "low"))
    """Which of two denoisers to train, for a model such as Wan 2.2 A14B: high draws the noisier levels, low the others.
    Unset for models with one."""


@dataclass(frozen=True)
class PipelineSamplingOptions(FlowSamplingOptions):
    """Sampling of noise levels."""

    timestep_sampling: str = redeclare(
        FlowSamplingOptions,
        "timestep_sampling",
        "pipeline",
        choices=("pipeline", *TIMESTEP_SAMPLINGS),
        help="How the noise levels of a flow model are drawn: pipeline as the sigmoid of a normal draw with the "
        "pipeline's own shift for the size of the image. The others are those of the other scripts.",
    )


INSTEAD: Mapping[str, str] = {
    "text_encoder": "use the pipeline's folder, which has its text encoders",
    "guidance_scale": "the denoiser is told what the pipeline tells it without guidance",
    "dit": "use --pretrained_model_name_or_path with the pipeline's folder",
}


@dataclass(frozen=True)
class PipelineOptions(TrainOptions):
    """All options of diffusers_train_network.py."""

    trust: TrustOptions = group(TrustOptions)
    experts: ExpertOptions = group(ExpertOptions)
    precision: ScaledPrecisionOptions = group(ScaledPrecisionOptions)
    text_caching: TextCachingOptions = group(TextCachingOptions)
    flow_sampling: PipelineSamplingOptions = group(PipelineSamplingOptions)
    flow_weighting: FlowWeightingOptions = group(FlowWeightingOptions)

    def implied(self) -> Mapping[str, Any]:
        """Train only the denoiser."""
        return train_denoiser_alone(self.network)
