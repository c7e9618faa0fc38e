"""The options specific to Z-Image, and musubi-tuner's names for them."""

from collections.abc import Mapping
from dataclasses import dataclass

from library.options.base import group, option
from library.options.dit import ALTERNATIVES, DitTrainOptions, PartOptions
from library.options.model import BASE, TRAINING_ADAPTER, ModelFile, part
from library.options.training.flow import FlowSamplingOptions


@dataclass(frozen=True)
class ZImageModelOptions(PartOptions):
    """The parts of the base model."""

    text_encoder: str | None = part("the text encoder Qwen3 4B")
    fp8_llm: bool = option(False)
    """Keep the text encoder Qwen3 in 8 bits."""
    model_version: str | None = option(None, usual=True, choices=("base", "turbo", "de-turbo"))
    """Which Z-Image the base is: turbo is distilled, and previews take 8 steps without guidance. Unset reads
    is_distilled in a folder's model_index.json, or looks for words such as turbo in the name."""


FILES: tuple[ModelFile, ...] = (
    ModelFile(BASE, "Comfy-Org/z_image", "z_image_bf16.safetensors", 12.3, "Apache-2.0"),
    ModelFile("text_encoder", "Comfy-Org/z_image_turbo", "qwen_3_4b.safetensors", 8.0, "Apache-2.0"),
    ModelFile("vae", "Comfy-Org/z_image_turbo", "ae.safetensors", 0.34, "Apache-2.0"),
    ModelFile(
        TRAINING_ADAPTER,
        "ostris/zimage_turbo_training_adapter",
        "zimage_turbo_training_adapter_v2.safetensors",
        release="turbo",
    ),
)

PARTS = "--text_encoder qwen_3_4b.safetensors --vae ae.safetensors"

INSTEAD: Mapping[str, str] = {**ALTERNATIVES, "fp8_vl": "use --fp8_llm", "fp8_text_encoder": "use --fp8_llm"}


@dataclass(frozen=True)
class ZImageOptions(DitTrainOptions):
    """All options of zimage_train_network.py."""

    parts: ZImageModelOptions = group(ZImageModelOptions)
    flow_sampling: FlowSamplingOptions = group(FlowSamplingOptions, timestep_sampling="shift", discrete_flow_shift=2.0)
