"""The `BaseModelSpec`s of FLUX.1 and Chroma."""

from collections.abc import Mapping

from library.architectures.flux.assembly import CHROMA_RECIPE, LATENTS, RECIPE, build, build_objective
from library.architectures.flux.layers import CHROMA_TARGETS, NAMES, TARGETS
from library.architectures.flux.merging import CHROMA_FILE, FILE
from library.architectures.flux.options import FluxOptions
from library.checkpoints.adapter_names import FileNaming
from library.checkpoints.base_model_spec import (
    ALL,
    DIFFUSERS,
    GENERIC,
    KOHYA,
    NONE,
    BaseModelSpec,
    Certainty,
    Gap,
    Reader,
    Sign,
)
from library.models.transformer_file import transformer_fields

WIDTH = 3072
# What ComfyUI, Forge and diffusers read was found by giving their loading code files with every layer in each naming.
NO_T5 = Gap(ALL, r"(lora_te3|text_encoder_2|text_encoders_t5xxl)_.*", "it does not support LoRA for FLUX.1's T5")
T5_OF_DIFFUSERS = Gap(
    DIFFUSERS, r"text_encoder_2_encoder_block_.*", "it does not support LoRA for T5 under diffusers' names"
)
INPUTS = r"lora_unet_(img|txt|time|vector|guidance)_in(_.*)?"
NO_INPUTS = Gap(KOHYA, INPUTS, "it does not support LoRA for FLUX.1's input layers")
CHROMA_ONLY = r"distilled_guidance_layer"
CHROMA_INPUTS = Gap(
    KOHYA, r"lora_unet_(img|txt)_in", "it does not support LoRA for Chroma's input layers under kohya's names"
)

LOST_INPUTS = Gap(KOHYA, INPUTS, "it does not find FLUX.1's input layers under kohya's names")
LOST_PARTS = Gap(
    KOHYA,
    rf"lora_unet_(img_in|txt_in|{CHROMA_ONLY}_.*)",
    "it does not find Chroma's input layers and approximator under kohya's names",
)
LOST_LAYERS = Gap(
    DIFFUSERS,
    rf"transformer_{CHROMA_ONLY}_layers_.*",
    "it does not find the layers of Chroma's approximator under diffusers' names",
)
NO_APPROXIMATOR = Gap(
    DIFFUSERS, rf"transformer_{CHROMA_ONLY}_.*", "it does not find Chroma's approximator under diffusers' names"
)


def explain_unknown_modules(modules: Mapping[str, FileNaming | None]) -> str | None:
    """Return why diffusers refuses a file with modules under kohya's names that FLUX.1 lacks; None if it has none."""
    if any(
        naming == "kohya" and name.startswith("lora_unet_") and NAMES.find(name) is None
        for name, naming in modules.items()
    ):
        return "it refuses a file in kohya's naming with modules that FLUX.1 does not have"
    return None


def explain_approximator(modules: Mapping[str, FileNaming | None]) -> str | None:
    """Return why diffusers refuses a file with an approximator under kohya's names; None if it has none."""
    if any(naming == "kohya" and CHROMA_ONLY in name for name, naming in modules.items()):
        return "it refuses LoRA of Chroma's approximator under kohya's names"
    return None


SPECS = (
    BaseModelSpec(
        **transformer_fields(FILE, TARGETS, RECIPE, FluxOptions, build, build_objective, LATENTS, called="a FLUX"),
        checkpoint=(Sign(r"double_blocks\.|single_transformer_blocks\.", Certainty.NAMES),),
        adapter=(
            Sign(r"^transformer_transformer_blocks_.*_attn_to_q_", width=WIDTH),
            Sign(r"_((double|single)_blocks|single_transformer_blocks)_\d+_", Certainty.NAMES),
        ),
        version=r"flux(?!_2)",
        architecture=r"flux-1",
        pipelines=("Flux",),
        readers={
            "ComfyUI": Reader(ALL, ALL, gaps=(T5_OF_DIFFUSERS,)),
            "Forge": Reader(ALL, KOHYA | DIFFUSERS, gaps=(T5_OF_DIFFUSERS,)),
            "diffusers": Reader(
                KOHYA | DIFFUSERS, KOHYA | DIFFUSERS, gaps=(NO_T5, NO_INPUTS), refuses=explain_unknown_modules
            ),
            "stable-diffusion.cpp": Reader(ALL, KOHYA | GENERIC, gaps=(LOST_INPUTS,)),
        },
    ),
    BaseModelSpec(
        **transformer_fields(
            CHROMA_FILE,
            CHROMA_TARGETS,
            CHROMA_RECIPE,
            FluxOptions,
            build,
            build_objective,
            LATENTS,
            script="flux_train_network.py",
        ),
        script_flag="--model_type chroma",
        checkpoint=(Sign(rf"\b{CHROMA_ONLY}\."),),
        adapter=(
            Sign(rf"_{CHROMA_ONLY}_"),
            # Chroma's blocks are FLUX.1's without modulation: if a file has no other layers, its metadata decides.
            Sign(r"^transformer_transformer_blocks_.*_attn_to_q_", width=WIDTH),
            Sign(r"_((double|single)_blocks|single_transformer_blocks)_\d+_", Certainty.NAMES),
        ),
        version=r"chroma",
        architecture=r"chroma",
        pipelines=("Chroma",),
        variants={r"\bnerf_image_embedder\.": "a Chroma Radiance model, which has no latents and is not supported"},
        readers={
            "ComfyUI": Reader(ALL, GENERIC, gaps=(NO_APPROXIMATOR,)),
            "Forge": Reader(KOHYA | GENERIC, KOHYA),
            "diffusers": Reader(KOHYA | DIFFUSERS, NONE, gaps=(CHROMA_INPUTS,), refuses=explain_approximator),
            "stable-diffusion.cpp": Reader(ALL, KOHYA | GENERIC, gaps=(LOST_PARTS, LOST_LAYERS)),
        },
    ),
)
