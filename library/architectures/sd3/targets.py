"""What adapters may attach to in Stable Diffusion 3; module paths are those of the original checkpoint."""

from library.architectures.sd3.adapter_names import NAMES
from networks.core.sites.targets import AdapterTargets, Embedders, Part, thirds

CLIP_BLOCKS = ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")
T5_BLOCKS = ("T5Attention", "T5DenseGatedActDense")

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
)
