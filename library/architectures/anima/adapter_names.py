"""The names of the layers of Anima in adapter files.

Module paths are those of the original checkpoint.
"""

from collections.abc import Iterator

from library.architectures.anima.checkpoint_keys import BLOCK, TOP, diffusers_path
from library.checkpoints.adapter_names import BaseNames, ModuleNames, text_module
from library.models.language_models import LAYER_LINEAR
from library.models.layer_keys import name_layer

NUM_BLOCKS, NUM_ADAPTER_BLOCKS, NUM_LAYER_LINEARS = 28, 6, 28  # of the first release; others are deeper


ADAPTER_BLOCK = (
    *(f"{layer}.{name}_proj" for layer in ("self_attn", "cross_attn") for name in ("q", "k", "v", "o")),
    *("mlp.0", "mlp.2"),
)


def denoiser_paths() -> Iterator[str]:
    """Yield the path of every Linear layer that an adapter may target."""
    yield from (path for path in TOP if not path.endswith("_norm"))
    for number in range(NUM_BLOCKS):
        yield from (f"blocks.{number}.{layer}" for layer in BLOCK if not layer.endswith("_norm"))
    for number in range(NUM_ADAPTER_BLOCKS):
        yield from (f"llm_adapter.blocks.{number}.{layer}" for layer in ADAPTER_BLOCK)


def denoiser_module(path: str) -> ModuleNames:
    return name_layer(path, (diffusers_path(path),), prefix="")


def qwen3_module(path: str) -> ModuleNames:
    return text_module(path, "lora_te", "qwen3_06b", "text_encoder", level="model.")


NAMES = BaseNames(
    "anima",
    (
        *map(denoiser_module, denoiser_paths()),
        *(qwen3_module(f"layers.{n}.{name}") for n in range(NUM_LAYER_LINEARS) for name in LAYER_LINEAR),
    ),
    stacks=("lora_unet_blocks", "lora_unet_llm_adapter_blocks", "lora_te_layers"),
)
