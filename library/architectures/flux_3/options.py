"""The options specific to FLUX.3 Image Klein, and replacements for those of other scripts."""

from collections.abc import Mapping
from dataclasses import dataclass

from library.options.base import group, option
from library.options.dit import ALTERNATIVES, DitTrainOptions, PartOptions
from library.options.model import BASE, TRAINING_ADAPTER, ModelFile
from library.options.training.flow import FlowSamplingOptions

SHIFT = 6.93  # of noise levels at every size, in training and at inference


@dataclass(frozen=True)
class Flux3ModelOptions(PartOptions):
    """The parts of the base model."""

    fp8_text_encoder: bool = option(False)
    """Keep the text encoder in 8 bits."""
    edit: bool = option(False, usual=True)
    """Train with the reference images of the data set. Unset leaves out the layers that only they need, which are an
    eighth of the model."""


FILES: tuple[ModelFile, ...] = (
    ModelFile(
        BASE,
        "black-forest-labs/flux-3-image-klein-comfy",
        "flux3-image-klein-base-bf16.safetensors",
        11.1,
        "FLUX Kommunity",
    ),
    ModelFile("text_encoder", "Qwen/Qwen3-VL-4B-Instruct", "", 8.9, "Apache-2.0"),
    ModelFile("vae", "Comfy-Org/vae-text-encorder-for-flux-klein-4b", "flux2-vae.safetensors", 0.34, "Apache-2.0"),
    ModelFile(
        TRAINING_ADAPTER, "SimpleTuner/flux-3-klein-image-training-assistant", "", release=r"ref_time_in\.in_layer"
    ),
)

PARTS = "--text_encoder qwen3vl_4b.safetensors --vae flux2-vae.safetensors"

INSTEAD: Mapping[str, str] = ALTERNATIVES


@dataclass(frozen=True)
class Flux3Options(DitTrainOptions):
    """All options of flux_3_train_network.py."""

    parts: Flux3ModelOptions = group(Flux3ModelOptions)
    flow_sampling: FlowSamplingOptions = group(
        FlowSamplingOptions, timestep_sampling="shift", discrete_flow_shift=SHIFT
    )
