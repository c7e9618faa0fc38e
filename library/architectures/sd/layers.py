"""The layers of Stable Diffusion 1.x and 2.x: their names in adapter files, what adapters target, and the view of the
models for network modules.

Module paths are diffusers' and transformers'.
"""

from collections.abc import Sequence
from functools import partial

from torch import nn

from library.architectures.sd.load import NUM_SD2_LAYERS
from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.models.clip import names as clip_names
from library.models.clip.clip import ClipView
from library.models.unet import names as unet_names
from library.models.unet.checkpoint_keys import UnetLayout
from networks.core.targets.targets import AdapterTargets, BlockList, Part

LAYOUT = UnetLayout(layers_per_block=2, has_attention=(True, True, True, False))
DEPTHS = (1, 1, 1, 1)
NUM_SD1_LAYERS = 12
# The text encoders of the two generations have the same name in kohya's and diffusers' files, but not in generic ones.
GENERIC_ENCODERS = {"sd1": "clip_l", "sd2": "clip_h"}


def unet_module(path: str, layout: UnetLayout = LAYOUT) -> ModuleNames:
    return unet_names.unet_module(path, layout, named_after_file=False)


def clip_module(path: str, base: str = "sd1") -> ModuleNames:
    return clip_names.clip_module(path, "lora_te", GENERIC_ENCODERS[base], "text_encoder")


def text_encoder_names(base: str, num_layers: int) -> BaseNames:
    unet = map(unet_module, unet_names.unet_paths(LAYOUT, DEPTHS))
    return BaseNames(base, (*unet, *map(partial(clip_module, base=base), clip_names.clip_paths(num_layers))))


NAMES = text_encoder_names("sd1", NUM_SD1_LAYERS)
SD2_NAMES = text_encoder_names("sd2", NUM_SD2_LAYERS)


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
