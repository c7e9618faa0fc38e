"""The layers of MOSS-Image: their names in checkpoints and adapter files, and what adapters target.

Module paths are those of the published checkpoint. ComfyUI's model fuses q, k and v, and its files may do so too; under
`diffusion_model.` it finds them apart all the same.
"""

import re
from collections.abc import Iterator

from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.models.layer_keys import GENERIC_PREFIX, KOHYA_PREFIX, name_layer
from networks.core.targets.targets import AdapterTargets, Embedders, Part, thirds

NUM_LAYERS, NUM_TEXT_BLOCKS = 42, 2
FUSED, PARTS = "proj.qkv", ("proj.q", "proj.k", "proj.v")
TOP = (
    "video_embedder", "text_embedder.proj", "time_embedding.0", "time_embedding.2", "shared_block_modulation",
    "video_head_modulation", "final_linear_video",
)  # fmt: skip
BLOCK = (*PARTS, "proj.o", "proj.ffn_up_gate", "proj.ffn_down")
TEXT_BLOCK = ("qkv", "proj", "ffn_gate", "ffn_up", "ffn_down")
STACKS = {"layers": (*BLOCK, FUSED), "text_embedder.blocks": TEXT_BLOCK}


def is_linear(path: str) -> bool:
    """Return True for the path of a Linear layer, including the fused one of ComfyUI's files."""
    match = re.fullmatch(r"(layers|text_embedder\.blocks)\.\d+\.(.+)", path)
    return path in TOP if match is None else match[2] in STACKS[match[1]]


def linear_paths(num_layers: int = NUM_LAYERS) -> Iterator[str]:
    """Yield the path of every Linear layer for `num_layers` main blocks."""
    yield from TOP
    yield from (f"text_embedder.blocks.{n}.{layer}" for n in range(NUM_TEXT_BLOCKS) for layer in TEXT_BLOCK)
    yield from (f"layers.{n}.{layer}" for n in range(num_layers) for layer in BLOCK)


def denoiser_module(path: str) -> ModuleNames:
    """Name a layer; a layer that ComfyUI's files fuse gets the names of its parts."""
    parts = [path.replace(FUSED, part) for part in PARTS] if path.endswith(FUSED) else [path]
    return name_layer(path, parts, prefix=GENERIC_PREFIX, others=("transformer.", KOHYA_PREFIX))


NAMES = BaseNames(
    "moss_image", tuple(map(denoiser_module, linear_paths())), fused=((FUSED, PARTS),), saved_naming="diffusers"
)
TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("SingleStreamBlock",)),
    ranks={"attn_dim": r"\.proj\.[qkvo]$", "mlp_dim": r"\.proj\.ffn_"},
    embedders=Embedders(
        "in_dims",
        (
            r"video_embedder", r"text_embedder", r"time_embedding", r"shared_block_modulation",
            r"video_head_modulation", r"final_linear_video",
        ),
    ),
    block_choices={"train_block_indices": r"^layers\.(\d+)\."},
    fused={r"^text_embedder\.blocks\.\d+\.qkv$": thirds},
    names=NAMES,
    expressions="path",
    elsewhere=list_network_arguments,
)  # fmt: skip
