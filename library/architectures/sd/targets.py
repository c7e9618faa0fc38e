"""The layers of Stable Diffusion 1.x and 2.x that adapters target, and the view of the models for network modules."""

from collections.abc import Sequence

from torch import nn

from library.architectures.sd.adapter_names import NAMES, SD2_NAMES
from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames
from library.models.clip import names as clip_names
from library.models.clip.clip import ClipView
from library.models.unet import names as unet_names
from networks.core.targets.targets import AdapterTargets, BlockList, Part


def unet_block_list() -> BlockList:
    """Return the 25 entries of block_dims: 12 down, the middle, 12 up.

    A level has three: one for each residual block with its attention; its down- or upsampler belongs to the third.
    """

    def patterns(side: str) -> list[str]:
        return [
            rf"^{side}_blocks\.{level}\.((resnets|attentions)\.{position}\."
            + (rf"|{side}samplers\.)" if position == 2 else ")")
            for level in range(4)
            for position in range(3)
        ]

    down = patterns("down")[:11]  # the coarsest level has no downsampler
    # The lists are sd-scripts', whose entry 0 belongs to no block.
    return BlockList(("", *down, r"^mid_block\.", *patterns("up")), down=12, mid=1, up=12)


TARGETS = AdapterTargets(
    denoiser=Part(
        "lora_unet", blocks=("Transformer2DModel",), attention=("Attention",), conv_blocks=unet_names.CONV_BLOCKS
    ),
    text_encoders=(Part("lora_te", blocks=clip_names.CLIP_BLOCKS),),
    block_list=unet_block_list(),
    names=BaseNames("sd", (*NAMES.modules, *SD2_NAMES.modules)),  # both share the U-Net and kohya's names
    elsewhere=list_network_arguments,
)


class UNet2DConditionModel(nn.Module):
    """The U-Net's layers under their paths in files, which are diffusers'."""

    adapter_targets = TARGETS


class TimeLayers(nn.Module):
    """The two layers that embed the timestep.

    LyCORIS's default preset `full` names these layers, and since version 4 also diffusers' class for them. It refuses a
    layer that is named twice, so the view uses another class.
    """


def view(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[nn.Module | list[nn.Module], nn.Module]:
    """Return (text encoder, U-Net) for `create_network` and `apply_to`; every layer is the real one.

    The first is an empty list once the text encoder has been freed.
    """
    if not text_encoders:
        return [], unet_view(denoiser)
    (encoder,) = text_encoders
    # Not a list: LyCORIS numbers the prefixes of encoders in a list (lora_te1), and files of SD have lora_te.
    return ClipView(encoder), unet_view(denoiser)


def unet_view(unet: nn.Module) -> nn.Module:
    """Return a view of diffusers' U-Net in which only the timestep embedder has another class."""
    root = UNet2DConditionModel()
    for name, child in unet.named_children():
        root.add_module(name, with_children(TimeLayers(), child) if name == "time_embedding" else child)
    return root


def with_children(parent: nn.Module, of: nn.Module) -> nn.Module:
    """Add the children of another module to `parent` and return it."""
    for name, child in of.named_children():
        parent.add_module(name, child)
    return parent
