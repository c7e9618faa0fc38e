"""The `BaseModelSpec`s of Stable Diffusion 1.x and 2.x."""

from dataclasses import replace
from functools import partial

from library.architectures.sd.assembly import LATENTS, build, metadata
from library.architectures.sd.layers import NAMES, SD2_NAMES, TARGETS
from library.architectures.sd.load import TITLES
from library.architectures.sd.merging import open_base_model, view_for_networks
from library.checkpoints.base_model_spec import ALL, KOHYA, BaseModelSpec, BlockWeights, Certainty, Gap, Reader, Sign
from library.models.unet.block_weights import BASE, MID, block_of, every_block, side
from library.models.unet.spec import (
    ADAPTED_CLIP,
    ADAPTED_TEXT_INPUT,
    ADAPTED_UNET,
    ATTENTION_INPUT,
    READERS,
    TEXT_INPUT,
    UNET,
)
from library.options.train import TrainOptions

SD1_TEXT_WIDTH, SD2_TEXT_WIDTH = 768, 1024
# Found by giving stable-diffusion.cpp files with every layer.
NO_OUTER_LAYERS = Gap(
    ALL, r".*_(conv_in|conv_out|time_embedding_linear_[12])", "it does not read conv_in, conv_out and time_embedding"
)
PACKED_QKV = Gap(
    KOHYA, r"lora_te_.*_self_attn_[qkv]_proj", "q, k and v of SD 2's text encoder are one matrix in the checkpoint"
)

# Lists of --lbws with 17 numbers name only these blocks, lists with 26 all.
WITH_ATTENTION = (BASE, *side("IN", 1, 2, 4, 5, 7, 8), MID, *side("OUT", *range(3, 12)))
BLOCK_WEIGHTS = BlockWeights((WITH_ATTENTION, every_block()), block_of)


def adapter_metadata(is_v2: bool, architecture: str, predicts_velocity: bool) -> dict[str, str]:
    return metadata(is_v2, predicts_velocity)


SD1 = BaseModelSpec(
    name="sd1",
    title="Stable Diffusion 1.x",
    called=f"an {TITLES['sd1']}",
    script="train_network.py",
    options=TrainOptions,
    build=build,
    latents=LATENTS,
    checkpoint=(Sign(UNET, Certainty.FAMILY), Sign(TEXT_INPUT, Certainty.NAMES, width=SD1_TEXT_WIDTH)),
    adapter=(
        Sign(ADAPTED_UNET, Certainty.FAMILY),
        Sign(ADAPTED_CLIP, Certainty.FAMILY),
        Sign(ADAPTED_TEXT_INPUT, width=SD1_TEXT_WIDTH),
    ),
    version=r"sd_v1",
    architecture=r"stable-diffusion-v1",
    pipelines=("StableDiffusion",),
    folders=("unet",),
    readers={**READERS, "stable-diffusion.cpp": Reader(ALL, KOHYA, gaps=(NO_OUTER_LAYERS,))},
    names=NAMES,
    network_arguments=TARGETS.arguments,
    open_for_merging=partial(open_base_model, "sd1"),
    view_for_networks=partial(view_for_networks, "sd1"),
    adapter_metadata=partial(adapter_metadata, False),
    block_weights=BLOCK_WEIGHTS,
)
SD2 = replace(
    SD1,
    name="sd2",
    title="Stable Diffusion 2.x",
    called=f"an {TITLES['sd2']}",
    script_flag="--v2",
    checkpoint=(
        Sign(r"cond_stage_model\.model\."),
        Sign(TEXT_INPUT, Certainty.NAMES, width=SD2_TEXT_WIDTH),
        Sign(ATTENTION_INPUT, Certainty.PART, num_axes=2),  # SD 1.x has 1x1 convolutions there
    ),
    adapter=(
        Sign(ADAPTED_TEXT_INPUT, width=SD2_TEXT_WIDTH),
        Sign(rf"{ADAPTED_CLIP}.*_[qkv]_proj_", width=SD2_TEXT_WIDTH),
    ),
    version=r"sd_v2",
    architecture=r"stable-diffusion-v2",
    readers={**READERS, "stable-diffusion.cpp": Reader(ALL, KOHYA, gaps=(PACKED_QKV,))},
    names=SD2_NAMES,
    open_for_merging=partial(open_base_model, "sd2"),
    view_for_networks=partial(view_for_networks, "sd2"),
    adapter_metadata=partial(adapter_metadata, True),
)
SPECS = (SD1, SD2)
