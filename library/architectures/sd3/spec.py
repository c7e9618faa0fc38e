"""The `BaseModelSpec` of Stable Diffusion 3 and 3.5."""

from library.architectures.sd3.assembly import LATENTS, RECIPE, build, build_objective
from library.architectures.sd3.layers import TARGETS
from library.architectures.sd3.merging import FILE
from library.architectures.sd3.options import Sd3Options
from library.checkpoints.base_model_spec import (
    ALL,
    DIFFUSERS,
    GENERIC,
    KOHYA,
    BaseModelSpec,
    Certainty,
    Gap,
    Reader,
    Sign,
)
from library.models.transformer_file import transformer_fields

T5_OF_DIFFUSERS = Gap(
    DIFFUSERS, r"text_encoder_3_encoder_block_.*", "it does not support LoRA for T5 under diffusers' names"
)


def adapter_metadata(architecture: str, predicts_velocity: bool) -> dict[str, str]:
    """Return the metadata of an adapter for a checkpoint, including the model's version."""
    # sd-scripts writes only "medium", "5-medium" or "5-large".
    version = architecture.removeprefix("stable-diffusion-3-")
    return {**RECIPE.of_checkpoint(architecture), "ss_base_model_version": version}


SPECS = (
    BaseModelSpec(
        **transformer_fields(
            FILE,
            TARGETS,
            RECIPE,
            Sd3Options,
            build,
            build_objective,
            LATENTS,
            title="Stable Diffusion 3",
            called="an SD3",
            adapter_metadata=adapter_metadata,
        ),
        checkpoint=(Sign(r"joint_blocks\."),),
        adapter=(Sign(r"_joint_blocks_"), Sign(r"^transformer_transformer_blocks_", Certainty.NAMES)),
        version=r"(5-)?(medium|large)|sd3",
        architecture=r"stable-diffusion-3",
        pipelines=("StableDiffusion3",),
        readers={
            "ComfyUI": Reader(ALL, ALL, gaps=(T5_OF_DIFFUSERS,)),
            "Forge": Reader(KOHYA | GENERIC, KOHYA | DIFFUSERS, gaps=(T5_OF_DIFFUSERS,)),
            "diffusers": Reader(DIFFUSERS, DIFFUSERS, gaps=(T5_OF_DIFFUSERS,)),
            "stable-diffusion.cpp": Reader(GENERIC | DIFFUSERS, GENERIC),
        },
    ),
)
