"""The layers of Z-Image that adapters target."""

from library.architectures.specs import list_network_arguments
from library.architectures.zimage.adapter_names import NAMES
from networks.core.targets.targets import AdapterTargets, Embedders, Part, thirds

LEFT_OUT = (r".*(_modulation|_refiner).*",)  # unless include_patterns includes them again, as in musubi-tuner

TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("JointTransformerBlock",), exclude=LEFT_OUT),
    ranks={
        "attn_dim": r"\.attention\.",
        "mod_dim": r"\.adaLN_modulation\.",
        "refiner_dim": r"_refiner\.",
        "mlp_dim": r"\.feed_forward\.",
    },
    embedders=Embedders("embedder_dims", (r"x_embedder", r"t_embedder", r"cap_embedder")),
    block_choices={"train_block_indices": r"^layers\.(\d+)\."},
    fused={r"\.attention\.qkv$": thirds},
    names=NAMES,
    expressions="path",
    elsewhere=list_network_arguments,
)
