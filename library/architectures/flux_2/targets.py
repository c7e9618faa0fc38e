"""The layers of FLUX.2 that adapters target."""

from library.architectures.flux_2.adapter_names import NAMES
from library.architectures.specs import list_network_arguments
from networks.core.targets.targets import AdapterTargets, Embedders, Part, qkv_and_rest, thirds

MODULATIONS = (r"double_stream_modulation_img", r"double_stream_modulation_txt", r"single_stream_modulation")

TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("DoubleStreamBlock", "SingleStreamBlock"), attention=("SelfAttention",)),
    ranks={
        "img_attn_dim": r"\.img_attn\.",
        "txt_attn_dim": r"\.txt_attn\.",
        "img_mlp_dim": r"\.img_mlp\.",
        "txt_mlp_dim": r"\.txt_mlp\.",
        "single_dim": r"^single_blocks\.\d+\.linear",
    },
    embedders=Embedders("in_dims", (r"img_in", r"time_in", r"guidance_in", r"txt_in", *MODULATIONS)),
    block_choices={
        "train_double_block_indices": r"^double_blocks\.(\d+)\.",
        "train_single_block_indices": r"^single_blocks\.(\d+)\.",
    },
    subsets={"double": r"^double_blocks\.", "single": r"^single_blocks\."},
    fused={r"_attn\.qkv$": thirds, r"\.linear1$": qkv_and_rest},
    names=NAMES,
    expressions="path",
    elsewhere=list_network_arguments,
)
