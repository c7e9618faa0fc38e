"""The modules of the U-Net models in the three namings of adapter files."""

from collections.abc import Iterator

from library.checkpoints.adapter_names import ModuleNames
from library.models.unet.checkpoint_keys import UnetLayout, unet_to_ldm

WIDENING_LEVELS = (1, 2)  # the first residual block of these levels widens its input
RESNET = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2")
OUTER = ("conv_in", "conv_out", "conv_norm_out", "time_embedding.linear_1", "time_embedding.linear_2")
SIZE_EMBEDDING = ("add_embedding.linear_1", "add_embedding.linear_2")
TRANSFORMER = (
    *("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
    *(f"{a}.{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "to_out.0")),
)
CONV_BLOCKS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")  # classes of convolutional blocks


def unet_paths(layout: UnetLayout, depths: tuple[int, ...]) -> Iterator[str]:
    """Yield diffusers' path of every module with weights; `depths` counts the transformer blocks of each level."""
    yield from OUTER
    for level, attends in enumerate(layout.has_attention):
        for layer in range(layout.layers_per_block):
            has_shortcut = layer == 0 and level in WIDENING_LEVELS
            yield from block_paths(f"down_blocks.{level}", layer, depths[level] if attends else 0, has_shortcut)
        if level < layout.num_levels - 1:
            yield f"down_blocks.{level}.downsamplers.0.conv"
    yield from block_paths("mid_block", 0, depths[-1], has_shortcut=False)
    yield from block_paths("mid_block", 1, 0, has_shortcut=False)
    for level, attends in enumerate(reversed(layout.has_attention)):
        for layer in range(layout.layers_per_block + 1):
            depth = depths[layout.num_levels - 1 - level] if attends else 0
            yield from block_paths(f"up_blocks.{level}", layer, depth, has_shortcut=True)
        if level < layout.num_levels - 1:
            yield f"up_blocks.{level}.upsamplers.0.conv"


def block_paths(stem: str, layer: int, depth: int, has_shortcut: bool) -> Iterator[str]:
    """Yield the paths of a residual block and, if `depth` is not 0, of the attention after it."""
    yield from (f"{stem}.resnets.{layer}.{name}" for name in RESNET)
    if has_shortcut:
        yield f"{stem}.resnets.{layer}.conv_shortcut"
    if depth:
        yield from (f"{stem}.attentions.{layer}.{name}" for name in ("norm", "proj_in", "proj_out"))
        for n in range(depth):
            yield from (f"{stem}.attentions.{layer}.transformer_blocks.{n}.{name}" for name in TRANSFORMER)


def unet_module(path: str, layout: UnetLayout, named_after_file: bool) -> ModuleNames:
    """Name one module; kohya's name follows the single file's path with `named_after_file`, else diffusers' path."""
    original = unet_to_ldm(f"{path}.weight", layout).removesuffix(".weight")
    names = f"lora_unet_{original.replace('.', '_')}", f"lora_unet_{path.replace('.', '_')}"
    kohya, alias = names if named_after_file else names[::-1]
    return ModuleNames(kohya=kohya, generic=f"diffusion_model.{original}", diffusers=f"unet.{path}", aliases=(alias,))
