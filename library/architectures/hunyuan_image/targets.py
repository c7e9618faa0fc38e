"""What adapters may attach to in HunyuanImage 2.1; module paths are those of the view, which has ComfyUI's names."""

from library.architectures.hunyuan_image.adapter_names import NAMES
from networks.core.sites.targets import AdapterTargets, Part, qkv_and_rest, thirds

TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("MMDoubleStreamBlock", "MMSingleStreamBlock")),
    fused={r"_attn_qkv$": thirds, r"\.linear1$": qkv_and_rest},
    names=NAMES,
)
