"""Stable Diffusion XL as network modules see it: module paths are the names in adapter files.

Files name the U-Net's layers after the single-file layout (`input_blocks_4_1_...`), diffusers' model has them under
other paths. The view is a tree with the paths of files; attention blocks and layers in it are the real ones.
"""

from collections.abc import Sequence

from torch import nn

from library.architectures.sdxl.targets import TARGETS
from library.models.clip import clip_body
from library.models.clip_view import ClipView
from library.models.unet_keys import UnetLayout, unet_to_ldm
from library.protocols import AdapterView

WHOLE = ("Transformer2DModel",)  # blocks that have the same names inside in both layouts
RENAMED = ("ResnetBlock2D", "Downsample2D", "Upsample2D")  # blocks whose layers have other names in files


class SdxlUNet2DConditionModel(nn.Module):
    """The U-Net's layers under the paths that files name them by."""


class ResnetBlock2D(nn.Module):
    """A residual block; network modules find it by the name of this class."""


class Downsample2D(nn.Module):
    """The layer that halves the size; network modules find it by the name of this class."""


class Upsample2D(nn.Module):
    """The layer that doubles the size; network modules find it by the name of this class."""


BLOCKS: dict[str, type[nn.Module]] = {kind.__name__: kind for kind in (ResnetBlock2D, Downsample2D, Upsample2D)}


def build_view(layout: UnetLayout) -> AdapterView:
    """The view of models whose U-Net has this layout."""

    def view(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[list[nn.Module], nn.Module]:
        """(both text encoders, U-Net) for `create_network` and `apply_to`; every layer is the real one."""
        unet = unet_view(denoiser, layout)
        unet.adapter_targets = TARGETS  # type: ignore[assignment]  # a plain attribute beside the modules
        return [ClipView(clip_body(encoder)) for encoder in text_encoders], unet

    return view


def unet_view(unet: nn.Module, layout: UnetLayout) -> nn.Module:
    """diffusers' U-Net under the paths of the single-file layout."""
    placed: dict[str, nn.Module] = {}  # path in files -> a real module, or an empty block of the view
    hidden: list[str] = []  # diffusers' paths of blocks that are placed whole
    for path, module in unet.named_modules():
        if any(path.startswith(f"{block}.") for block in hidden):
            continue
        kind = type(module).__name__
        has_weights = bool(list(module.parameters(recurse=False)))
        if kind in WHOLE or has_weights:
            placed[in_files(path, layout)] = module
            hidden.append(path)
        elif kind in RENAMED:
            placed[block_in_files(path, layout)] = BLOCKS[kind]()
    root = SdxlUNet2DConditionModel()
    for path in sorted(placed, key=in_order):
        put(root, path, placed[path])
    return root


def in_files(path: str, layout: UnetLayout) -> str:
    return unet_to_ldm(f"{path}.weight", layout).removesuffix(".weight")


def block_in_files(path: str, layout: UnetLayout) -> str:
    """The path of a renamed block: that of any of its layers without the end."""
    layer = "conv1" if ".resnets." in path else "conv"
    parent = in_files(f"{path}.{layer}", layout)
    return parent.removesuffix(".in_layers.2").removesuffix(".op").removesuffix(".conv")


def in_order(path: str) -> tuple[tuple[int, str], ...]:
    """The order in which the single-file layout declares its modules: numbers by size, input to output."""
    tops = ("time_embed", "label_emb", "input_blocks", "middle_block", "output_blocks", "out")
    inner = ("in_layers", "emb_layers", "out_layers", "skip_connection")
    first, *rest = path.split(".")
    ranks = [(tops.index(first), "")]
    for name in rest:
        ranks.append((int(name), "") if name.isdigit() else (inner.index(name) if name in inner else 0, name))
    return tuple(ranks)


def put(root: nn.Module, path: str, module: nn.Module) -> None:
    """Hang a module into the tree; containers that are missing on the way are made."""
    *parents, name = path.split(".")
    here = root
    for parent in parents:
        below = here._modules.get(parent)
        if below is None:
            below = nn.Module()
            here.add_module(parent, below)
        here = below
    here.add_module(name, module)
