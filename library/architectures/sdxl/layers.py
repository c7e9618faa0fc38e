"""The layers of Stable Diffusion XL: their names in adapter files, what adapters target, and the view of the models for
network modules.

Files name the U-Net's layers after the single-file layout (`input_blocks_4_1_...`), but diffusers' model has other
paths. Network modules therefore get a view: a tree with the paths of files that contains the real layers and attention
blocks.
"""

from collections.abc import Sequence

from torch import nn

from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.models.clip import names as clip_names
from library.models.clip.clip import ClipView
from library.models.unet import names as unet_names
from library.models.unet.checkpoint_keys import UnetLayout, unet_to_ldm
from library.protocols import AdapterView
from networks.core.targets.targets import AdapterTargets, BlockList, Part

LAYOUT = UnetLayout(layers_per_block=2, has_attention=(False, True, True))
DEPTHS = (0, 2, 10)
ENCODERS = (("lora_te1", "clip_l", "text_encoder"), ("lora_te2", "clip_g", "text_encoder_2"))
NUM_LAYERS = (12, 32)


def unet_module(path: str, layout: UnetLayout = LAYOUT) -> ModuleNames:
    return unet_names.unet_module(path, layout, named_after_file=True)


def clip_module(path: str, encoder: int) -> ModuleNames:
    """Name one module of the first (0) or second (1) text encoder."""
    return clip_names.clip_module(path, *ENCODERS[encoder])


NAMES = BaseNames(
    "sdxl",
    (
        *map(unet_module, (*unet_names.unet_paths(LAYOUT, DEPTHS), *unet_names.SIZE_EMBEDDING)),
        *(clip_module(path, 0) for path in clip_names.clip_paths(NUM_LAYERS[0])),
        *(clip_module(path, 1) for path in clip_names.clip_paths(NUM_LAYERS[1])),
    ),
)


NUM_SIDE_BLOCKS = 9  # of input blocks and of output blocks
NUM_MIDDLE_BLOCKS = 3


def unet_block_list() -> BlockList:
    """Return the 23 entries of block_dims: embeddings, 9 input blocks, 3 middle blocks, 9 output blocks, output
    layers."""
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
        "lora_unet", blocks=("Transformer2DModel",), attention=("Attention",), conv_blocks=unet_names.CONV_BLOCKS
    ),
    text_encoders=tuple(Part(prefix, blocks=clip_names.CLIP_BLOCKS) for prefix, _, _ in ENCODERS),
    block_list=unet_block_list(),
    names=NAMES,
    elsewhere=list_network_arguments,
)


WHOLE = ("Transformer2DModel",)  # blocks with the same inner names in both layouts
RENAMED = unet_names.CONV_BLOCKS  # blocks whose layers have other names in files


class SdxlUNet2DConditionModel(nn.Module):
    """The U-Net's layers under their paths in adapter files."""


class ResnetBlock2D(nn.Module):
    """A residual block; network modules find it by this class name."""


class Downsample2D(nn.Module):
    """The layer that halves the size; network modules find it by this class name."""


class Upsample2D(nn.Module):
    """The layer that doubles the size; network modules find it by this class name."""


BLOCKS: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in (ResnetBlock2D, Downsample2D, Upsample2D)}


def build_view(layout: UnetLayout) -> AdapterView:
    """Build the view of models whose U-Net has the layout `layout`."""

    def view(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[list[nn.Module], nn.Module]:
        """Return (both text encoders, U-Net) for `create_network` and `apply_to`; every layer is the real one."""
        unet = unet_view(denoiser, layout)
        unet.adapter_targets = TARGETS  # type: ignore[assignment]  # a plain attribute beside the modules
        return [ClipView(encoder) for encoder in text_encoders], unet

    return view


def unet_view(unet: nn.Module, layout: UnetLayout) -> nn.Module:
    """Return diffusers' U-Net under the paths of the single-file layout."""
    modules: dict[str, nn.Module] = {}  # path in files -> a real module, or an empty block of the view
    whole_blocks: list[str] = []  # diffusers' paths of blocks that are placed whole
    for path, module in unet.named_modules():
        if any(path.startswith(f"{block}.") for block in whole_blocks):
            continue
        kind = type(module).__name__
        has_weights = bool(list(module.parameters(recurse=False)))
        if kind in WHOLE or has_weights:
            modules[file_path(path, layout)] = module
            whole_blocks.append(path)
        elif kind in RENAMED:
            modules[block_file_path(path, layout)] = BLOCKS[kind]()
    root = SdxlUNet2DConditionModel()
    # sd-scripts creates adapters, and writes .ckpt files, in the order of this layout. diffusers registers up_blocks
    # before mid_block, and attentions before resnets.
    for path in sorted(modules, key=layout_sort_key):
        put(root, path, modules[path])
    return root


def file_path(path: str, layout: UnetLayout) -> str:
    return unet_to_ldm(f"{path}.weight", layout).removesuffix(".weight")


def block_file_path(path: str, layout: UnetLayout) -> str:
    """Return the path of a renamed block: that of one of its layers, without the layer's name."""
    # The table of names has layers only, of which every residual block has conv1, and every sampler has conv.
    layer = "conv1" if ".resnets." in path else "conv"
    parent = file_path(f"{path}.{layer}", layout)
    return parent.removesuffix(".in_layers.2").removesuffix(".op").removesuffix(".conv")


def layout_sort_key(path: str) -> tuple[tuple[int, str], ...]:
    """Return the sort key of the single-file layout's order: numbers by value, input to output."""
    tops = ("time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out")
    inner = ("in_layers", "emb_layers", "out_layers", "skip_connection")
    top, *names = path.split(".")
    ranks = [(tops.index(top), "")]
    for name in names:
        ranks.append((int(name), "") if name.isdigit() else (inner.index(name) if name in inner else 0, name))
    return tuple(ranks)


def put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Add a module to the tree at `path`, creating missing containers."""
    *parents, name = path.split(".")
    container = root
    for parent in parents:
        child = container._modules.get(parent)
        if child is None:
            child = nn.Module()
            container.add_module(parent, child)
        container = child
    container.add_module(name, module)
