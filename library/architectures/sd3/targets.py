"""The layers of Stable Diffusion 3 and 3.5 that adapters target, and the view of the models for network modules."""

from collections.abc import Sequence

from torch import nn

from library.architectures.sd3.adapter_names import NAMES
from library.architectures.specs import list_network_arguments
from library.models.clip.clip import ClipView
from library.models.clip.names import CLIP_BLOCKS
from library.models.t5 import T5_BLOCKS
from networks.core.targets.targets import AdapterTargets, Embedders, Part, thirds

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
