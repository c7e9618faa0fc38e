"""The layers of Stable Diffusion 3 and 3.5: their names in the original layout, which is ours, in diffusers' and in
adapter files, what adapters target, and the view of the models for network modules."""

from collections.abc import Sequence

from torch import nn

from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames, ModuleNames, text_module
from library.models.clip.clip import ClipView
from library.models.clip.names import CLIP_BLOCKS, clip_module, clip_paths
from library.models.layer_keys import LayerKeys, Layers, Stack, name_layer
from library.models.t5 import T5_BLOCKS, T5_LINEAR
from networks.core.targets.targets import AdapterTargets, Embedders, Part, thirds

MAX_DEPTH = 38  # of SD3.5 large; the others have 24 blocks
NUM_CLIP_LAYERS = {"clip_l": 12, "clip_g": 32}
NUM_T5_LAYERS = 24

EMBEDDERS = {
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    "final_layer.linear": "proj_out",
}
BLOCK: Layers = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.proj": ("attn2.to_out.0",),
}
KEYS = LayerKeys(EMBEDDERS, (Stack("joint_blocks", "transformer_blocks", BLOCK),))


def denoiser_module(path: str) -> ModuleNames:
    """Name a layer. Modulations of two parts have the shift first here, and the scale first in diffusers."""
    # These are the last layer's, and that of the text stream in the last block, which has only shift and scale.
    # `ModuleNames.swaps_pair` tells it from the others by its number of rows.
    swaps_pair = path.endswith("adaLN_modulation.1") and ".x_block." not in path
    return name_layer(path, KEYS.sources(path), swaps_pair=swaps_pair)


T5_PATHS = (f"encoder.block.{n}.{name}" for n in range(NUM_T5_LAYERS) for name in T5_LINEAR)
NAMES = BaseNames(
    "sd3",
    (
        *map(denoiser_module, KEYS.linear_paths({"joint_blocks": MAX_DEPTH})),
        *(clip_module(path, "lora_te1", "clip_l", "text_encoder") for path in clip_paths(NUM_CLIP_LAYERS["clip_l"])),
        *(clip_module(path, "lora_te2", "clip_g", "text_encoder_2") for path in clip_paths(NUM_CLIP_LAYERS["clip_g"])),
        *(text_module(path, "lora_te3", "t5xxl", "text_encoder_3") for path in T5_PATHS),
    ),
)


TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("SingleDiTBlock",)),
    text_encoders=(
        Part("lora_te1", blocks=CLIP_BLOCKS),
        Part("lora_te2", blocks=CLIP_BLOCKS),
        Part("lora_te3", blocks=T5_BLOCKS, needs="train_t5xxl"),
    ),
    ranks={
        "context_attn_dim": r"\.context_block\.attn\.",
        "context_mlp_dim": r"\.context_block\.mlp\.",
        "context_mod_dim": r"\.context_block\.adaLN_modulation\.",
        "x_attn_dim": r"\.x_block\.attn2?\.",
        "x_mlp_dim": r"\.x_block\.mlp\.",
        "x_mod_dim": r"\.x_block\.adaLN_modulation\.",
    },
    embedders=Embedders(
        "emb_dims",
        (
            r"context_embedder",
            r"t_embedder",
            r"x_embedder",
            r"y_embedder",
            r"final_layer\.adaLN_modulation",
            r"final_layer\.linear",
        ),
    ),
    block_choices={"train_block_indices": r"^joint_blocks\.(\d+)\."},
    fused={r"qkv$": thirds},
    names=NAMES,
    elsewhere=list_network_arguments,
)


def view(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """Return ([CLIP-L, CLIP-G, T5 if present], denoiser) for `create_network` and `apply_to`."""
    clips = [ClipView(encoder) for encoder in text_encoders[:2]]
    return [*clips, *text_encoders[2:]], denoiser
