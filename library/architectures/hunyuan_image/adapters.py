"""The layers of HunyuanImage 2.1 that adapters change: what they attach to, and the names that files have for it.

Files name the layers as ComfyUI's model does. The original checkpoint, which is what the denoiser follows, calls some
of them otherwise; adapters of those names are dropped by ComfyUI without an error. So network modules see a view, whose
paths are the names in files.
"""

from collections.abc import Iterator, Sequence

from torch import nn

from library.architectures.hunyuan_image.checkpoint_keys import DOUBLE, SINGLE, sources
from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames, ModuleNames, Piece
from networks.core.targets.targets import AdapterTargets, Part, qkv_and_rest, thirds

NUM_BLOCKS = {"double_blocks": 20, "single_blocks": 40}
QKV_SHARES = (1, 1, 1)
LINEAR1_SHARES = (1, 1, 1, 4)  # the MLP is four times as wide as the model
RENAMED = {  # block's child -> its layers and their names in files
    "img_mod": {"linear": "lin"},
    "txt_mod": {"linear": "lin"},
    "modulation": {"linear": "lin"},
    "img_mlp": {"fc1": "0", "fc2": "2"},
    "txt_mlp": {"fc1": "0", "fc2": "2"},
}


def denoiser_paths() -> Iterator[str]:
    """Path in the original checkpoint of every Linear layer of the blocks."""
    for stack, layers in (("double_blocks", DOUBLE), ("single_blocks", SINGLE)):
        for number in range(NUM_BLOCKS[stack]):
            yield from (f"{stack}.{number}.{layer}" for layer in layers if not layer.endswith("_norm"))


def in_files(path: str) -> str:
    """The path in files of a layer of the denoiser."""
    parent, _, layer = path.rpartition(".")
    names = RENAMED.get(parent.rpartition(".")[2], {})
    return f"{parent}.{names.get(layer, layer)}"


def denoiser_module(path: str) -> ModuleNames:
    """sd-scripts names layers as the original checkpoint does, ComfyUI, which our files follow, as its own model."""
    found = sources(path)
    shares = LINEAR1_SHARES if path.endswith(".linear1") else QKV_SHARES
    pieces = tuple(Piece(f"transformer.{name}", share) for name, share in zip(found, shares, strict=False))
    named = in_files(path)
    return ModuleNames(
        kohya=f"lora_unet_{named.replace('.', '_')}",
        generic=f"diffusion_model.{comfy_path(named)}",
        diffusers=f"transformer.{found[0]}" if len(found) == 1 else pieces,
        aliases=(f"lora_unet_{path.replace('.', '_')}",) if named != path else (),
    )


def comfy_path(named: str) -> str:
    """The path in ComfyUI's model, which has the attention of each stream in a module of its own."""
    return named.replace("_attn_", "_attn.")


NAMES = BaseNames("hunyuan_image", tuple(map(denoiser_module, denoiser_paths())))


TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("MMDoubleStreamBlock", "MMSingleStreamBlock")),
    fused={r"_attn_qkv$": thirds, r"\.linear1$": qkv_and_rest},
    names=NAMES,
    elsewhere=list_network_arguments,
)


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
