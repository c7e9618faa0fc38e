"""FLUX.1 as everybody outside this package knows it."""

import re

from library.architectures.flux.adapters import NAMES, TARGETS
from library.architectures.flux.assembly import RECIPE, build
from library.architectures.flux.load import CHROMA_MARK
from library.architectures.flux.merging import open_base_model, seen_by_networks
from library.architectures.flux.options import FluxOptions
from library.checkpoints.model_card import ALL, DIFFUSERS, GENERIC, KOHYA, Certainty, Gap, ModelCard, Reader, Sign

WIDTH = 3072
NO_T5 = Gap(ALL, r"(lora_te3|text_encoder_2|text_encoders_t5xxl)_.*", "it has no place for LoRA of FLUX.1's T5")
T5_OF_DIFFUSERS = Gap(
    DIFFUSERS, r"text_encoder_2_encoder_block_.*", "it has no place for LoRA of T5 under diffusers' names"
)
INPUTS = r"lora_unet_(img|txt|time|vector|guidance)_in(_.*)?"
NO_INPUTS = Gap(KOHYA, INPUTS, "it has no place for LoRA of FLUX.1's input layers")
LOST_INPUTS = Gap(KOHYA, INPUTS, "it does not find FLUX.1's input layers under kohya's names")

CARDS = (
    ModelCard(
        name="flux",
        title="FLUX.1",
        called="a FLUX",
        script="flux_train_network.py",
        options=FluxOptions,
        build=build,
        checkpoint=(Sign(r"double_blocks\.|single_transformer_blocks\.", Certainty.SHARED),),
        adapter=(
            Sign(r"^transformer_transformer_blocks_.*_attn_to_q_", width=WIDTH),
            Sign(r"_((double|single)_blocks|single_transformer_blocks)_\d+_", Certainty.SHARED),
        ),
        version=r"flux",
        pipelines=("Flux",),
        variants={rf"\b{re.escape(CHROMA_MARK)}": "a Chroma model, which is not supported yet"},
        readers={
            "ComfyUI": Reader(ALL, ALL, gaps=(T5_OF_DIFFUSERS,)),
            "Forge": Reader(ALL, KOHYA | DIFFUSERS, gaps=(T5_OF_DIFFUSERS,)),
            "diffusers": Reader(KOHYA | DIFFUSERS, KOHYA | DIFFUSERS, gaps=(NO_T5, NO_INPUTS)),
            "stable-diffusion.cpp": Reader(ALL, KOHYA | GENERIC, gaps=(LOST_INPUTS,)),
        },
        names=NAMES,
        network_arguments=TARGETS.arguments,
        open_for_merging=open_base_model,
        seen_by_networks=seen_by_networks,
        adapter_metadata=RECIPE.of_checkpoint,
    ),
)
