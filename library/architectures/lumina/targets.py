"""The layers of Lumina-Image 2.0 that adapters target."""

from library.architectures.lumina.adapter_names import NAMES
from library.architectures.specs import list_network_arguments
from networks.core.targets.targets import AdapterTargets, Embedders, Part


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
    ranks={
        "attn_dim": r"\.attention\.",
        "mod_dim": r"\.adaLN_modulation\.",
        "refiner_dim": r"_refiner\.",
        "mlp_dim": r"\.feed_forward\.",
    },
    embedders=Embedders("embedder_dims", (r"x_embedder", r"t_embedder", r"cap_embedder")),
    block_choices={"train_block_indices": r"^layers\.(\d+)\."},
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
