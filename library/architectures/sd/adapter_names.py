"""The modules of Stable Diffusion 1.x under the three names that adapter files give them."""

from collections.abc import Iterator

from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.models.unet_keys import UnetLayout, unet_to_ldm

LAYOUT = UnetLayout(layers_per_block=2, has_attention=(True, True, True, False))
WIDENING_LEVELS = (1, 2)  # their first residual block has more output than input channels
NUM_CLIP_LAYERS = 12
RESNET = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2")
TRANSFORMER = (
    "norm",
    "proj_in",
    "proj_out",
    *(f"transformer_blocks.0.{name}" for name in ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2")),
    *(f"transformer_blocks.0.{a}.{p}" for a in ("attn1", "attn2") for p in ("to_q", "to_k", "to_v", "to_out.0")),
)
CLIP_LAYER = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    *("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"),
)


def unet_paths() -> Iterator[str]:
    """diffusers' path of every module with weights in the U-Net."""
    yield from ("conv_in", "conv_out", "conv_norm_out", "time_embedding.linear_1", "time_embedding.linear_2")
    for level, attends in enumerate(LAYOUT.has_attention):
        for layer in range(LAYOUT.layers_per_block):
            has_shortcut = layer == 0 and level in WIDENING_LEVELS
            yield from block_paths(f"down_blocks.{level}", layer, attends, has_shortcut)
        if level < LAYOUT.num_levels - 1:
            yield f"down_blocks.{level}.downsamplers.0.conv"
    yield from block_paths("mid_block", 0, attends=True, has_shortcut=False)
    yield from block_paths("mid_block", 1, attends=False, has_shortcut=False)
    for level, attends in enumerate(reversed(LAYOUT.has_attention)):
        for layer in range(LAYOUT.layers_per_block + 1):
            yield from block_paths(f"up_blocks.{level}", layer, attends, has_shortcut=True)
        if level < LAYOUT.num_levels - 1:
            yield f"up_blocks.{level}.upsamplers.0.conv"


def block_paths(stem: str, layer: int, attends: bool, has_shortcut: bool) -> Iterator[str]:
    yield from (f"{stem}.resnets.{layer}.{name}" for name in RESNET)
    if has_shortcut:
        yield f"{stem}.resnets.{layer}.conv_shortcut"
    if attends:
        yield from (f"{stem}.attentions.{layer}.{name}" for name in TRANSFORMER)


def clip_paths() -> Iterator[str]:
    """Path of every module with weights in the text encoder, its embeddings left out."""
    yield from (f"encoder.layers.{layer}.{name}" for layer in range(NUM_CLIP_LAYERS) for name in CLIP_LAYER)
    yield "final_layer_norm"


def unet_module(path: str, layout: UnetLayout = LAYOUT) -> ModuleNames:
    original = unet_to_ldm(f"{path}.weight", layout).removesuffix(".weight")
    return ModuleNames(
        kohya=f"lora_unet_{path.replace('.', '_')}",
        generic=f"diffusion_model.{original}",
        diffusers=f"unet.{path}",
        aliases=(f"lora_unet_{original}",),
    )


def clip_module(path: str) -> ModuleNames:
    """diffusers writes and reads "text_model." in files, whether the loaded model has that level or not."""
    return ModuleNames(
        kohya=f"lora_te_text_model_{path.replace('.', '_')}",
        generic=f"text_encoders.clip_l.transformer.text_model.{path}",
        diffusers=f"text_encoder.text_model.{path}",
        aliases=(f"text_encoder.{path}",),
    )


NAMES = BaseNames("sd1", (*map(unet_module, unet_paths()), *map(clip_module, clip_paths())))
