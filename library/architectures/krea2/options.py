"""The options specific to Krea 2, and musubi-tuner's names for them."""

from collections.abc import Mapping
from dataclasses import dataclass

from library.options.base import group, option, without_effect
from library.options.dit import ALTERNATIVES, DitTrainOptions, PartOptions
from library.options.model import BASE, TRAINING_ADAPTER, ModelFile, edit, part
from library.options.training.flow import FlowSamplingOptions

IN_PLACE = "previews swap all weights in place on the GPU"


@dataclass(frozen=True)
class Krea2ModelOptions(PartOptions):
    """The parts of the base model."""

    text_encoder: str | None = part("the text encoder Qwen3-VL 4B")
    fp8_text_encoder: bool = option(False)
    """Keep the text encoder in 8 bits."""
    dit_variant: str | None = option(None, usual=True, choices=("raw", "turbo"))
    """Which Krea 2 the base is: turbo is distilled, and previews take 8 steps without guidance. Unset reads
    is_distilled in a folder's model_index.json, or looks for words such as turbo in the name."""
    edit: bool = edit()
    turbo_dit: str | None = option(
        None,
        path="file or folder",
        usual=True,
        affects_training=False,
        needs="sample_prompts",
        excludes={
            "blocks_to_swap": IN_PLACE,
            "shard_base": IN_PLACE,
            "fit": f"the fastest settings may offload blocks, and {IN_PLACE}",
            "base_weights": "they are merged into the model that is trained, and previews would lack them",
        },
        refused_by_leco="prompts are trained on what the model draws itself",
    )
    """File or folder of Krea 2 Turbo, stored as the base is, to draw previews with: 8 steps without guidance. It is
    read for each event of previews and takes as much main memory as the base."""
    turbo_dit_cache: bool = without_effect(
        False, "the system caches the file of --turbo_dit while main memory has room for it", affects_training=False
    )


FILES: tuple[ModelFile, ...] = (
    ModelFile(BASE, "krea/Krea-2-Raw", "raw.safetensors", 26.3, "Krea 2 Community"),
    ModelFile("text_encoder", "Qwen/Qwen3-VL-4B-Instruct", "", 8.9, "Apache-2.0"),
    ModelFile("vae", "Comfy-Org/Qwen-Image_ComfyUI", "qwen_image_vae.safetensors", 0.25, "Apache-2.0"),
    ModelFile(TRAINING_ADAPTER, "ostris/krea2_turbo_training_adapter", "", release="turbo"),
)

PARTS = "--text_encoder qwen3vl_4b.safetensors --vae qwen_image_vae.safetensors"

INSTEAD: Mapping[str, str] = {
    **ALTERNATIVES,
    "model_version": "use --dit_variant",
    "kv_cache": "it needs references that see only each other, which are not trained here; remove it",
    "fp8_vl": "use --fp8_text_encoder",
    "fp8_llm": "use --fp8_text_encoder",
}


@dataclass(frozen=True)
class Krea2Options(DitTrainOptions):
    """All options of krea2_train_network.py."""

    parts: Krea2ModelOptions = group(Krea2ModelOptions)
    flow_sampling: FlowSamplingOptions = group(FlowSamplingOptions, timestep_sampling="krea2_shift")
