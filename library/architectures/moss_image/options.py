"""The options specific to MOSS-Image, and replacements for those of other scripts."""

from collections.abc import Mapping
from dataclasses import dataclass

from library.options.base import group, option, redeclare
from library.options.dit import ALTERNATIVES, DitTrainOptions, PartOptions
from library.options.model import BASE, ModelFile, edit, part
from library.options.training.flow import TIMESTEP_SAMPLINGS, FlowSamplingOptions

OWN_SAMPLING = "moss_image"
FILES: tuple[ModelFile, ...] = (
    ModelFile(BASE, "Comfy-Org/MOSS-Image", "moss_image_base_bf16.safetensors", 10.2, "Apache-2.0"),
    ModelFile("text_encoder", "Comfy-Org/MOSS-Image", "qwen3.5_9b_bf16.safetensors", 19.3),
    ModelFile("vae", "Comfy-Org/MOSS-Image", "flux2-vae.safetensors"),
)

PARTS = "--text_encoder qwen3.5_9b_bf16.safetensors --vae flux2-vae.safetensors"


@dataclass(frozen=True)
class MossImageModelOptions(PartOptions):
    """The parts of the base model."""

    text_encoder: str | None = part("the text encoder Qwen3.5 9B")
    edit: bool = edit()
    fp8_text_encoder: bool = option(False)
    """Keep the text encoder in 8 bits."""


@dataclass(frozen=True)
class MossImageSamplingOptions(FlowSamplingOptions):
    """Sampling of noise levels."""

    timestep_sampling: str = redeclare(
        FlowSamplingOptions,
        "timestep_sampling",
        OWN_SAMPLING,
        choices=(*TIMESTEP_SAMPLINGS, OWN_SAMPLING),
        help="How noise levels are drawn: moss_image as the model was trained, sigma from a table by "
        "--weighting_scheme, the others as for every flow model.",
    )
    discrete_flow_shift: float = redeclare(FlowSamplingOptions, "discrete_flow_shift", 1.0)


INSTEAD: Mapping[str, str] = {
    **ALTERNATIVES,
    "fp8_vl": "use --fp8_text_encoder",
    "fp8_llm": "use --fp8_text_encoder",
    "model_version": "Base and SFT are trained alike; remove it",
}


@dataclass(frozen=True)
class MossImageOptions(DitTrainOptions):
    """All options of moss_image_train_network.py."""

    parts: MossImageModelOptions = group(MossImageModelOptions)
    flow_sampling: MossImageSamplingOptions = group(MossImageSamplingOptions)
