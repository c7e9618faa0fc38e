"""The names of the layers of Lumina-Image 2.0 in adapter files.

Module paths are those of the original checkpoint.
"""

from collections.abc import Iterator

from library.architectures.lumina.checkpoint_keys import BLOCK, TOP, sources
from library.checkpoints.adapter_names import BaseNames, ModuleNames, Piece, text_module

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
    return text_module(path, "lora_te", "gemma2_2b", "text_encoder", level="model.")


NAMES = BaseNames(
    "lumina",
    (
        *map(denoiser_module, denoiser_paths()),
        *(gemma_module(f"layers.{n}.{name}") for n in range(NUM_GEMMA_LAYERS) for name in GEMMA_LAYER),
    ),
)
