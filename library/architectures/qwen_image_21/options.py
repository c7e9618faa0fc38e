"""The options specific to Qwen-Image 2.1, and musubi-tuner's names for them."""

from collections.abc import Mapping
from dataclasses import dataclass

from library.options.base import group, option
from library.options.dit import ALTERNATIVES, DitTrainOptions, PartOptions
from library.options.model import BASE, ModelFile, edit, part
from library.options.training.flow import FlowSamplingOptions


@dataclass(frozen=True)
class QwenImage21ModelOptions(PartOptions):
    """The parts of the base model."""

    text_encoder: str | None = part("the text encoder Qwen3-VL 8B")
    edit: bool = edit()
    fp8_vl: bool = option(False)
    """Keep the text encoder Qwen3-VL in 8 bits."""


FILES: tuple[ModelFile, ...] = (
    ModelFile(BASE, "Comfy-Org/Qwen-Image-2.1", "qwen_image_2.1_bf16.safetensors", 14.2, "Qwen Research"),
    ModelFile("text_encoder", "Comfy-Org/Qwen-Image-2.1", "qwen3vl_8b_bf16.safetensors", 17.5, "Qwen Research"),
    ModelFile("vae", "Comfy-Org/Qwen-Image-2.1", "qwen_image_2.1_vae_bf16.safetensors", 0.68, "Qwen Research"),
)

PARTS = "--text_encoder qwen3vl_8b.safetensors --vae qwen_image_2.1_vae.safetensors"

INSTEAD: Mapping[str, str] = {
    **ALTERNATIVES,
    "fp8_llm": "use --fp8_vl",
    "fp8_text_encoder": "use --fp8_vl",
    "model_version": "there is one Qwen-Image 2.1; remove it",
    "dit_config": "sizes are read from the file; remove it",
}


@dataclass(frozen=True)
class QwenImage21Options(DitTrainOptions):
    """All options of qwen_image_21_train_network.py."""

    parts: QwenImage21ModelOptions = group(QwenImage21ModelOptions)
    flow_sampling: FlowSamplingOptions = group(FlowSamplingOptions, timestep_sampling="shift")
