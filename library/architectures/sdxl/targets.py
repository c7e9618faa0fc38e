"""What adapters may attach to in Stable Diffusion XL; module paths are those of its single-file layout."""

from library.architectures.sdxl.adapter_names import NAMES
from networks.core.sites.targets import AdapterTargets, BlockList, Part

CLIP_BLOCKS = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")
NUM_SIDE_BLOCKS = 9  # input blocks, and output blocks
NUM_MIDDLE_BLOCKS = 3


def unet_block_list() -> BlockList:
    """The 23 entries of block_dims: embeddings, 9 input blocks, 3 middle blocks, 9 output blocks, output layers."""
    return BlockList(
        patterns=(
            r"^(time_embed|label_emb)\.",
            *(rf"^input_blocks\.{n}\." for n in range(NUM_SIDE_BLOCKS)),
            *(rf"^middle_block\.{n}\." for n in range(NUM_MIDDLE_BLOCKS)),
            *(rf"^output_blocks\.{n}\." for n in range(NUM_SIDE_BLOCKS)),
            r"^out\.",
        ),
        down=NUM_SIDE_BLOCKS,
        mid=NUM_MIDDLE_BLOCKS,
        up=NUM_SIDE_BLOCKS,
        padding=1,
    )


TARGETS = AdapterTargets(
    denoiser=Part(
        "lora_unet",
        blocks=("Transformer2DModel",),
        conv_blocks=("ResnetBlock2D", "Downsample2D", "Upsample2D"),
    ),
    text_encoders=(Part("lora_te1", blocks=CLIP_BLOCKS), Part("lora_te2", blocks=CLIP_BLOCKS)),
    block_list=unet_block_list(),
    names=NAMES,
)
