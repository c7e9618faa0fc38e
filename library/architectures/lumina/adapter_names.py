"""The names of the layers of Lumina-Image 2.0 in adapter files.

Module paths are those of the original checkpoint.
"""

from library.architectures.lumina.checkpoint_keys import KEYS
from library.checkpoints.adapter_names import BaseNames, ModuleNames, text_module
from library.models.language_models import LAYER_LINEAR
from library.models.layer_keys import name_layer

NUM_BLOCKS = {"context_refiner": 2, "noise_refiner": 2, "layers": 26}
QKV_SHARES = (3, 1, 1)  # 24 heads of queries, 8 each of keys and values
NUM_LAYER_LINEARS = 26


def denoiser_module(path: str) -> ModuleNames:
    return name_layer(path, KEYS.sources(path), shares=QKV_SHARES)


def gemma_module(path: str) -> ModuleNames:
    return text_module(path, "lora_te", "gemma2_2b", "text_encoder", level="model.")


NAMES = BaseNames(
    "lumina",
    (
        *map(denoiser_module, KEYS.linear_paths(NUM_BLOCKS)),
        *(gemma_module(f"layers.{n}.{name}") for n in range(NUM_LAYER_LINEARS) for name in LAYER_LINEAR),
    ),
)
