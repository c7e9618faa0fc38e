"""What adapters may attach to in Lumina Image 2.0; module paths are those of the original checkpoint."""

from library.architectures.lumina.adapter_names import NAMES
from networks.core.sites.targets import AdapterTargets, Embedders, Part


def grouped_qkv(num_inputs: int, num_outputs: int) -> tuple[int, ...]:
    """q as wide as the input; k and v, whose heads several queries share, halve the rest."""
    rest = (num_outputs - num_inputs) // 2
    return (num_inputs, rest, rest)


TARGETS = AdapterTargets(
    denoiser=Part("lora_unet", blocks=("JointTransformerBlock", "FinalLayer")),
    text_encoders=(
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
)
