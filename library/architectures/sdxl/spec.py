"""The `BaseModelSpec` of Stable Diffusion XL."""

from library.architectures.sdxl.assembly import LATENTS, RECIPE, build
from library.architectures.sdxl.layers import NAMES, TARGETS
from library.architectures.sdxl.merging import open_base_model, view_for_networks
from library.architectures.sdxl.options import SdxlOptions
from library.checkpoints.base_model_spec import (
    DIFFUSERS,
    GENERIC,
    KOHYA,
    BaseModelSpec,
    BlockWeights,
    Certainty,
    Reader,
    Sign,
)
from library.models.unet.block_weights import BASE, MID, block_of, every_block, side
from library.models.unet.spec import ADAPTED_TEXT_INPUT, ADAPTED_UNET, READERS

TEXT_WIDTH = 2048

# Lists of --lbws with 12, 20 and 26 numbers: the blocks with attention, SDXL's blocks, and those of SD 1.x, of which
# SDXL lacks six.
WITH_ATTENTION = (BASE, *side("IN", 4, 5, 7, 8), MID, *side("OUT", *range(6)))
OWN_BLOCKS = (BASE, *side("IN", *range(9)), MID, *side("OUT", *range(9)))
BLOCK_WEIGHTS = BlockWeights(
    (WITH_ATTENTION, OWN_BLOCKS, every_block()), block_of, missing=frozenset(every_block()) - frozenset(OWN_BLOCKS)
)


def adapter_metadata(architecture: str, predicts_velocity: bool) -> dict[str, str]:
    prediction = "v" if predicts_velocity else "epsilon"
    return {**RECIPE.of_checkpoint(architecture), "modelspec.prediction_type": prediction}


SPECS = (
    BaseModelSpec(
        name="sdxl",
        title="Stable Diffusion XL",
        called="an SDXL",
        script="sdxl_train_network.py",
        prompts_script="sdxl_train_leco.py",
        options=SdxlOptions,
        build=build,
        latents=LATENTS,
        checkpoint=(Sign(r"conditioner\.embedders\.|diffusion_model\.label_emb\.|add_embedding\.linear_1"),),
        adapter=(
            Sign(ADAPTED_TEXT_INPUT, width=TEXT_WIDTH),
            Sign(rf"{ADAPTED_UNET}.*_transformer_blocks_[1-9]"),
            # It has two text encoders.
            Sign(
                r"^(lora_te2_|text_encoder_2_|text_encoders_clip_g_)",
                Certainty.PART,
                every_name=r"^(?!lora_te)|^lora_te[12]?_",
            ),
            Sign(r"^lora_unet_(input|middle|output)_block", Certainty.PART),
        ),
        version=r"sdxl",
        architecture=r"stable-diffusion-xl",
        pipelines=("StableDiffusionXL",),
        folders=("unet", "text_encoder_2"),
        variants={r"conditioner\.embedders\.0\.model\.": "the SDXL refiner; only the base model can be trained"},
        readers={**READERS, "Forge": Reader(KOHYA | GENERIC, KOHYA | DIFFUSERS)},
        names=NAMES,
        network_arguments=TARGETS.arguments,
        open_for_merging=open_base_model,
        view_for_networks=view_for_networks,
        adapter_metadata=adapter_metadata,
        ignores=RECIPE.ignores,
        block_weights=BLOCK_WEIGHTS,
    ),
)
