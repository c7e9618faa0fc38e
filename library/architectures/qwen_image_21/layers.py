"""The layers of Qwen-Image 2.1: their names in checkpoints and adapter files, and what adapters target.

Module paths are those of diffusers. ComfyUI has them too, except for the gate, which its files fuse with `proj`. Its
loader finds these two layers, for every kind of adapter, only below `transformer.`, and the fused layer only under the
other names.
"""

from collections.abc import Iterator

from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.models.layer_keys import GENERIC_PREFIX, KOHYA_PREFIX, name_layer
from networks.core.targets.targets import AdapterTargets, Embedders, Part

NUM_BLOCKS = 32
BLOCKS = "transformer_blocks"
TOP = (
    "img_in", "txt_in.in_layer", "txt_in.out_layer", "time_text_embed.timestep_embedder.linear_1",
    "time_text_embed.timestep_embedder.linear_2", "modulation.1", "norm_out.linear", "proj_out",
)  # fmt: skip
FUSED, PARTS = "img_mlp.gate_up", ("img_mlp.gate_layer", "img_mlp.proj")  # stacked rows in some of ComfyUI's files
LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", *PARTS, "img_mlp.out")


def is_linear(path: str) -> bool:
    """Return True for the path of a Linear layer, including the fused one of ComfyUI's files."""
    if path.startswith(f"{BLOCKS}."):
        return path.split(".", 2)[-1] in (*LAYERS, FUSED)
    return path in TOP


def linear_paths(num_blocks: int) -> Iterator[str]:
    """Yield the path of every Linear layer for `num_blocks` blocks."""
    yield from TOP
    yield from (f"{BLOCKS}.{number}.{layer}" for number in range(num_blocks) for layer in LAYERS)


def denoiser_module(path: str) -> ModuleNames:
    """Name a layer; a layer that ComfyUI's files fuse gets the names of its two parts."""
    if not path.endswith(FUSED):
        return name_layer(path, (path,))
    parts = [path.replace(FUSED, part) for part in PARTS]
    return name_layer(path, parts, others=(GENERIC_PREFIX, KOHYA_PREFIX))


NAMES = BaseNames(
    "qwen_image_21",
    tuple(map(denoiser_module, linear_paths(NUM_BLOCKS))),
    fused=((FUSED, PARTS),),
    saved_naming="diffusers",
    holds_all_kinds_in_diffusers=True,
)
TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("QwenImageTransformerBlock",), attention=("Attention",)),
    ranks={"attn_dim": r"\.attn\.", "mlp_dim": r"\.img_mlp\."},
    embedders=Embedders("in_dims", (r"img_in", r"time_text_embed", r"txt_in", r"modulation")),
    block_choices={"train_block_indices": r"^transformer_blocks\.(\d+)\."},
    names=NAMES,
    expressions="path",
    elsewhere=list_network_arguments,
)
