"""HunyuanImage 2.1 as network modules see it: module paths are the names in adapter files.

Files name the layers as ComfyUI's model does. The original checkpoint, which is what the denoiser follows, calls some
of them otherwise; adapters of those names are dropped by ComfyUI without an error.
"""

from collections.abc import Sequence

from torch import nn

from library.architectures.hunyuan_image.adapter_names import RENAMED
from library.architectures.hunyuan_image.targets import TARGETS


class HunyuanImageView(nn.Module):
    """The blocks under the paths that files name their layers by."""

    adapter_targets = TARGETS


class MMDoubleStreamBlock(nn.Module):
    """A double block; network modules find it by the name of this class."""


class MMSingleStreamBlock(nn.Module):
    """A single block; network modules find it by the name of this class."""


BLOCKS: dict[str, type[nn.Module]] = {
    "double_blocks": MMDoubleStreamBlock,
    "single_blocks": MMSingleStreamBlock,
}


def view(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """([], denoiser) for `create_network` and `apply_to`: the text encoders have no adapters. Every layer is the real
    one; what lies outside the blocks stands as it is."""
    root = HunyuanImageView()
    for name, child in denoiser.named_children():
        root.add_module(name, stack_view(child, BLOCKS[name]) if name in BLOCKS else child)
    return [], root


def stack_view(stack: nn.Module, kind: type[nn.Module]) -> nn.ModuleList:
    return nn.ModuleList(block_view(block, kind) for block in stack.children())


def block_view(block: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """A block with its layers under the names in files."""
    seen = kind()
    for name, child in block.named_children():
        if name in RENAMED:
            group = nn.Module()
            for layer, module in child.named_children():
                group.add_module(RENAMED[name][layer], module)
            seen.add_module(name, group)
        else:
            seen.add_module(name, child)
    return seen
