"""The layers of Krea 2 that adapters target."""

from library.architectures.krea2.adapter_names import NAMES
from library.architectures.specs import list_network_arguments
from networks.core.targets.targets import AdapterTargets, Part

TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("SingleStreamDiT",), attention=("Attention",)),  # all Linear layers
    ranks={"attn_dim": r"^blocks\.\d+\.attn\.", "mlp_dim": r"^blocks\.\d+\.mlp\.", "txtfusion_dim": r"^txtfusion\."},
    block_choices={"train_block_indices": r"^blocks\.(\d+)\."},
    names=NAMES,
    expressions="path",
    elsewhere=list_network_arguments,
)
