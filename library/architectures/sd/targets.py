"""What adapters may attach to in Stable Diffusion 1.x and 2.x; module paths are diffusers' and transformers'."""

from library.architectures.sd.adapter_names import NAMES, SD2_NAMES
from library.checkpoints.adapter_names import BaseNames
from networks.core.sites.targets import AdapterTargets, BlockList, Part


def unet_block_list() -> BlockList:
    """The 25 entries of block_dims: 12 down, the middle, 12 up.

    A level has three: its residual blocks with their attentions, and its down- or upsampler counts as the third.
    """

    def patterns(side: str) -> list[str]:
        return [
            rf"^{side}_blocks\.{level}\.((resnets|attentions)\.{position}\."
            + (rf"|{side}samplers\.)" if position == 2 else ")")
            for level in range(4)
            for position in range(3)
        ]

    down = patterns("down")[:11]  # the coarsest level has no downsampler
    return BlockList(("", *down, r"^mid_block\.", *patterns("up")), down=12, mid=1, up=12)


TARGETS = AdapterTargets(
    denoiser=Part(
        "lora_unet",
        blocks=("Transformer2DModel",),
        conv_blocks=("ResnetBlock2D", "Downsample2D", "Upsample2D"),
    ),
    text_encoders=(Part("lora_te", blocks=("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")),),
    block_list=unet_block_list(),
    names=BaseNames("sd", (*NAMES.modules, *SD2_NAMES.modules)),  # they share the U-Net and kohya's names
)
