"""The layers of FLUX.1 and Chroma that adapters target, and the view of the models for network modules."""

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from library.architectures.flux.adapter_names import CHROMA_NAMES, NAMES
from library.architectures.specs import list_network_arguments
from library.models.clip import names as clip_names
from library.models.clip.clip import ClipView
from library.models.t5 import T5_BLOCKS
from networks.core.targets.targets import AdapterTargets, Embedders, Part, qkv_and_rest, thirds

T5 = Part("lora_te3", blocks=T5_BLOCKS, needs="train_t5xxl")


TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("DoubleStreamBlock", "SingleStreamBlock"), attention=("SelfAttention",)),
    text_encoders=(Part("lora_te1", blocks=clip_names.CLIP_BLOCKS), T5),
    ranks={
        "img_attn_dim": r"\.img_attn\.",
        "txt_attn_dim": r"\.txt_attn\.",
        "img_mlp_dim": r"\.img_mlp\.",
        "txt_mlp_dim": r"\.txt_mlp\.",
        "img_mod_dim": r"\.img_mod\.",
        "txt_mod_dim": r"\.txt_mod\.",
        "single_dim": r"^single_blocks\.\d+\.linear",
        "single_mod_dim": r"^single_blocks\.\d+\.modulation\.",
    },
    embedders=Embedders("in_dims", (r"img_in", r"time_in", r"vector_in", r"guidance_in", r"txt_in")),
    block_choices={
        "train_double_block_indices": r"^double_blocks\.(\d+)\.",
        "train_single_block_indices": r"^single_blocks\.(\d+)\.",
    },
    subsets={"double": r"^double_blocks\.", "single": r"^single_blocks\."},
    fused={r"_attn\.qkv$": thirds, r"\.linear1$": qkv_and_rest},
    names=NAMES,
    elsewhere=list_network_arguments,
)


CHROMA_TARGETS = replace(
    TARGETS,
    denoiser=replace(TARGETS.denoiser, extra_blocks={"train_approximator": ("Approximator",)}),
    text_encoders=(T5,),
    ranks={name: pattern for name, pattern in TARGETS.ranks.items() if "mod_dim" not in name},
    names=CHROMA_NAMES,
)


def view(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """Return ([CLIP-L, T5 if present], denoiser) for `create_network` and `apply_to`.

    The denoiser's own paths are those in files.
    """
    clip = [ClipView(encoder) for encoder in text_encoders[:1]]
    return [*clip, *text_encoders[1:]], denoiser


def view_chroma(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    """Return ([T5 if present], denoiser), whose paths are those in files."""
    return [*text_encoders], denoiser
