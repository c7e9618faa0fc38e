"""The layers of Lumina Image 2.0 that adapters target, and their names in files.

Module paths are those of the original checkpoint.
"""

from collections.abc import Iterator, Sequence

from torch import nn

from library.architectures.lumina.checkpoint_keys import BLOCK, TOP, sources
from library.architectures.specs import list_network_arguments
from library.checkpoints.adapter_names import BaseNames, ModuleNames, Piece
from networks.core.targets.targets import AdapterTargets, Embedders, Part

NUM_BLOCKS = {"context_refiner": 2, "noise_refiner": 2, "layers": 26}
QKV_SHARES = (3, 1, 1)  # 24 heads of queries, 8 each of keys and values
NUM_GEMMA_LAYERS = 26
GEMMA_LAYER = (
    *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def denoiser_paths() -> Iterator[str]:
    """Yield the path of every Linear layer."""
    yield from (path for path in TOP if path != "cap_embedder.0")
    layers = [layer for layer in BLOCK if "norm" not in layer]
    for stack, num_blocks in NUM_BLOCKS.items():
        own = [layer for layer in layers if stack != "context_refiner" or not layer.startswith("adaLN")]
        yield from (f"{stack}.{number}.{layer}" for number in range(num_blocks) for layer in own)


def denoiser_module(path: str) -> ModuleNames:
    found = sources(path)
    pieces = tuple(Piece(f"transformer.{name}", share) for name, share in zip(found, QKV_SHARES, strict=False))
    return ModuleNames(
        kohya=f"lora_unet_{path.replace('.', '_')}",
        generic=f"diffusion_model.{path}",
        diffusers=f"transformer.{found[0]}" if len(found) == 1 else pieces,
    )


def gemma_module(path: str) -> ModuleNames:
    return ModuleNames(
        kohya=f"lora_te_{path.replace('.', '_')}",
        generic=f"text_encoders.gemma2_2b.transformer.model.{path}",
        diffusers=f"text_encoder.{path}",
    )


NAMES = BaseNames(
    "lumina",
    (
        *map(denoiser_module, denoiser_paths()),
        *(gemma_module(f"layers.{n}.{name}") for n in range(NUM_GEMMA_LAYERS) for name in GEMMA_LAYER),
    ),
)


def grouped_qkv(num_inputs: int, num_outputs: int) -> tuple[int, ...]:
    """Return the sizes of q, k and v: q is as wide as the input; k and v, shared by several queries, halve the rest."""
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
    elsewhere=list_network_arguments,
)


def view(text_encoders: Sequence[nn.Module], denoiser: nn.Module) -> tuple[nn.Module | list[nn.Module], nn.Module]:
    """Return (Gemma 2, denoiser) for `create_network` and `apply_to`; the paths of both are those in files."""
    return (text_encoders[0] if text_encoders else []), denoiser
