"""The layers of Lumina Image 2.0: their names in the original layout, which is ours, in diffusers' and in adapter
files, and what adapters target."""

from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames, ModuleNames, text_module
from library.models.language_models import LAYER_LINEAR
from library.models.layer_keys import Layers
from library.models.next_dit import TARGET_FIELDS, next_dit_keys
from networks.core.targets.targets import AdapterTargets, Part

MARK, DIFFUSERS_MARK = "layers.0.attention.qkv.weight", "time_caption_embed.caption_embedder.1.weight"
NUM_BLOCKS = {"context_refiner": 2, "noise_refiner": 2, "layers": 26}
NUM_GEMMA_LAYERS = 26

EMBEDDERS = "time_caption_embed"
TOP = {
    "x_embedder": "x_embedder",
    **{f"t_embedder.mlp.{n}": f"{EMBEDDERS}.timestep_embedder.linear_{n // 2 + 1}" for n in (0, 2)},
    **{f"cap_embedder.{n}": f"{EMBEDDERS}.caption_embedder.{n}" for n in (0, 1)},
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}
BLOCK: Layers = {
    "attention.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attention.out": ("attn.to_out.0",),
    "attention.q_norm": ("attn.norm_q",),
    "attention.k_norm": ("attn.norm_k",),
    **{f"feed_forward.w{n}": (f"feed_forward.linear_{n}",) for n in (1, 2, 3)},
    "attention_norm1": ("norm1.norm",),
    "ffn_norm1": ("ffn_norm1",),
    "attention_norm2": ("norm2",),
    "ffn_norm2": ("ffn_norm2",),
    "adaLN_modulation.1": ("norm1.linear",),
}
KEYS = next_dit_keys(
    TOP,
    BLOCK,
    ("norm1",),  # a plain norm in diffusers
    shares={"attention.qkv": (3, 1, 1)},  # 24 heads of queries, 8 each of keys and values
)


def gemma_module(path: str) -> ModuleNames:
    return text_module(path, "lora_te", "gemma2_2b", "text_encoder", level="model.")


NAMES = BaseNames(
    "lumina",
    (
        *KEYS.list_names(NUM_BLOCKS),
        *(gemma_module(f"layers.{n}.{name}") for n in range(NUM_GEMMA_LAYERS) for name in LAYER_LINEAR),
    ),
)


def grouped_qkv(num_inputs: int, num_outputs: int) -> tuple[int, ...]:
    """Return the widths of q, k and v: q is as wide as the input; k and v, shared by queries, halve the rest."""
    kv_width = (num_outputs - num_inputs) // 2
    return (num_inputs, kv_width, kv_width)


TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("JointTransformerBlock", "FinalLayer")),
    text_encoders=(
        # sd-scripts' list, with classes that only older versions of transformers have.
        Part("lora_te", blocks=("Gemma2Attention", "Gemma2FlashAttention2", "Gemma2SdpaAttention", "Gemma2MLP")),
    ),
    **TARGET_FIELDS,
    subsets={
        "transformer": r"^layers\.",
        "refiners": r"^(noise|context)_refiner\.",
        "noise_refiner": r"^noise_refiner\.",
        "context_refiner": r"^context_refiner\.",
    },
    fused={r"\.attention\.qkv$": grouped_qkv},
    names=NAMES,
    elsewhere=list_network_arguments,
)
