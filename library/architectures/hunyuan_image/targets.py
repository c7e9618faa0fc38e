"""The layers of HunyuanImage 2.1 that adapters target, and the models as network modules see them."""

from collections.abc import Sequence

from torch import nn

from library.architectures.hunyuan_image.adapter_names import NAMES, RENAMED
from library.architectures.specs import list_network_arguments
from networks.core.targets.targets import AdapterTargets, Part, qkv_and_rest, thirds

TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("MMDoubleStreamBlock", "MMSingleStreamBlock")),
    fused={r"_attn_qkv$": thirds, r"\.linear1$": qkv_and_rest},
    names=NAMES,
    elsewhere=list_network_arguments,
)


class HunyuanImageView(nn.Module):
    """The blocks under the paths by which files name their layers."""

    adapter_targets = TARGETS


class MMDoubleStreamBlock(nn.Module):
    """A double block; network modules find it by this class name."""


class MMSingleStreamBlock(nn.Module):
    """A single block; network modules find it by this class name."""


BLOCKS: dict[str, type[nn.Module]] = {
    "double_blocks": MMDoubleStreamBlock,
    "single_blocks": MMSingleStreamBlock,
}


def view(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """Return ([], denoiser) for `create_network` and `apply_to`: the text encoders have no adapters. Every layer is the
    real one; modules outside the blocks are unchanged."""
    root = HunyuanImageView()
    for name, child in denoiser.named_children():
        root.add_module(name, stack_view(child, BLOCKS[name]) if name in BLOCKS else child)
    return [], root


def stack_view(stack: nn.Module, kind: type[nn.Module]) -> nn.ModuleList:
    return nn.ModuleList(block_view(block, kind) for block in stack.children())


def block_view(block: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Return a block with its layers under their names in files."""
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
