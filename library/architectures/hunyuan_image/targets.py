"""The layers of HunyuanImage 2.1 that adapters target."""

from library.architectures.hunyuan_image.adapter_names import NAMES
from library.architectures.specs import list_network_arguments
from networks.core.targets.targets import AdapterTargets, Part, qkv_and_rest, thirds

TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("MMDoubleStreamBlock", "MMSingleStreamBlock")),
    fused={r"_attn\.qkv$": thirds, r"\.linear1$": qkv_and_rest},
    names=NAMES,
    elsewhere=list_network_arguments,
)
