"""The options specific to FLUX.2, and musubi-tuner's names for them."""

from collections.abc import Mapping
from dataclasses import dataclass

from library.options.base import group, option
from library.options.dit import ALTERNATIVES, DitTrainOptions, PartOptions
from library.options.model import BASE, ModelFile, edit
from library.options.training.flow import FlowSamplingOptions

VERSIONS = ("dev", "klein-4b", "klein-base-4b", "klein-9b", "klein-base-9b")


@dataclass(frozen=True)
class Flux2ModelOptions(PartOptions):
    """The parts of the base model."""

    text_encoder: str | None = option(None, path="part", usual=True)
    """File or folder of the text encoder: Qwen3 4B for klein 4B, Qwen3 8B for klein 9B, Mistral Small 3 for dev. Unset
    takes it from the base."""
    edit: bool = edit()
    fp8_text_encoder: bool = option(False)
    """Keep the text encoder in 8 bits."""
    model_version: str | None = option(None, usual=True, choices=VERSIONS)
    """Which FLUX.2 the base is. Unset recognises it from the file; distilled klein is then told from base by
    is_distilled in a folder's model_index.json, or by words such as base in the name."""


FILES: tuple[ModelFile, ...] = (
    ModelFile(BASE, "black-forest-labs/FLUX.2-klein-base-4B", "flux-2-klein-base-4b.safetensors", 7.8, "Apache-2.0"),
    ModelFile(
        BASE, "black-forest-labs/FLUX.2-klein-base-9B", "flux-2-klein-base-9b.safetensors", 18.2, "FLUX non-commercial"
    ),
    # "encorder" is what these repositories are called.
    ModelFile(
        "text_encoder", "Comfy-Org/vae-text-encorder-for-flux-klein-4b", "qwen_3_4b.safetensors", 8.0, "Apache-2.0"
    ),
    ModelFile("text_encoder", "Comfy-Org/vae-text-encorder-for-flux-klein-9b", "qwen_3_8b.safetensors", 16.4),
    ModelFile("vae", "Comfy-Org/vae-text-encorder-for-flux-klein-4b", "flux2-vae.safetensors", 0.34, "Apache-2.0"),
)

PARTS = "--text_encoder qwen_3_4b.safetensors --vae ae.safetensors"

INSTEAD: Mapping[str, str] = {**ALTERNATIVES, "fp8_vl": "use --fp8_text_encoder", "fp8_llm": "use --fp8_text_encoder"}


@dataclass(frozen=True)
class Flux2Options(DitTrainOptions):
    """All options of flux_2_train_network.py."""

    parts: Flux2ModelOptions = group(Flux2ModelOptions)
    flow_sampling: FlowSamplingOptions = group(FlowSamplingOptions, timestep_sampling="flux2_shift")
