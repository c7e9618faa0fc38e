"""What adapters may attach to in FLUX.1; module paths are those of the original checkpoint."""

from library.architectures.flux.adapter_names import NAMES
from networks.core.sites.targets import AdapterTargets, Embedders, Part, qkv_and_rest, thirds

TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("DoubleStreamBlock", "SingleStreamBlock")),
    text_encoders=(
        Part("lora_te1", blocks=("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP")),
        Part("lora_te3", blocks=("T5Attention", "T5DenseGatedActDense"), needs="train_t5xxl"),
    ),
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
)
