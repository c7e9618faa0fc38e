"""The layers of Z-Image: their names in the original layout, which is ours, in diffusers' and in adapter files, and
what adapters target.

Diffusers' naming of adapter files means its paths below `diffusion_model.` here, which both diffusers and ComfyUI read;
trainers write them below other prefixes too.
"""

from collections.abc import Mapping

from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames
from library.models.layer_keys import GENERIC_PREFIX, KOHYA_PREFIX, Layers
from library.models.next_dit import TARGET_FIELDS, next_dit_keys
from networks.core.targets.targets import AdapterTargets, Part, thirds

MARK, DIFFUSERS_MARK = "cap_pad_token", "all_x_embedder.2-1.weight"
PAD_TOKENS = ("cap_pad_token", "x_pad_token")  # parameters of the model itself, (1, M)
NUM_BLOCKS = {"context_refiner": 2, "noise_refiner": 2, "layers": 30}

# diffusers keeps the first and last layers by patch size: "2-1" is 2 x 2 latents of one frame.
TOP: Mapping[str, str] = {
    "x_embedder": "all_x_embedder.2-1",
    "final_layer.linear": "all_final_layer.2-1.linear",
    "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
    **{name: name for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.0", "cap_embedder.1")},
}
SAME_LAYERS = ("feed_forward.w1", "feed_forward.w2", "feed_forward.w3", "adaLN_modulation.0")
SAME_NORMS = ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2")
BLOCK: Layers = {
    "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
    "attention.out": ("attention.to_out.0",),
    "attention.q_norm": ("attention.norm_q",),
    "attention.k_norm": ("attention.norm_k",),
    **{name: (name,) for name in (*SAME_LAYERS, *SAME_NORMS)},
}
KEYS = next_dit_keys(
    TOP,
    BLOCK,
    BLOCK["attention_norm1"],
    parameters=PAD_TOKENS,
    prefix=GENERIC_PREFIX,
    others=("transformer.", KOHYA_PREFIX),
)
NAMES = BaseNames("zimage", tuple(KEYS.list_names(NUM_BLOCKS)), saved_naming="diffusers")
LEFT_OUT = (r".*(_modulation|_refiner).*",)  # unless include_patterns includes them again, as in musubi-tuner
TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("JointTransformerBlock",), exclude=LEFT_OUT),
    **TARGET_FIELDS,
    fused={r"\.attention\.qkv$": thirds},
    names=NAMES,
    expressions="path",
    elsewhere=list_network_arguments,
)
