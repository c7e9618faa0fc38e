"""The layers of Qwen-Image 2.1 that adapters target."""

from library.architectures.qwen_image_21.adapter_names import NAMES
from library.architectures.specs import list_network_arguments
from networks.core.targets.targets import AdapterTargets, Embedders, Part

TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("QwenImageTransformerBlock",), attention=("Attention",)),
    ranks={"attn_dim": r"\.attn\.", "mlp_dim": r"\.img_mlp\."},
    embedders=Embedders("in_dims", (r"img_in", r"time_text_embed", r"txt_in", r"modulation")),
    block_choices={"train_block_indices": r"^transformer_blocks\.(\d+)\."},
    names=NAMES,
    expressions="path",
    elsewhere=list_network_arguments,
)
