"""The names of the layers of FLUX.1 and Chroma in adapter files.

Module paths are those of the original checkpoint.
"""

from collections.abc import Iterator
from dataclasses import replace

from library.architectures.flux.checkpoint_keys import APPROXIMATOR, KEYS
from library.checkpoints.adapter_names import BaseNames, ModuleNames, text_module
from library.models.clip import names as clip_names
from library.models.layer_keys import name_layer
from library.models.t5 import T5_LINEAR

NUM_BLOCKS = {"double_blocks": 19, "single_blocks": 38}
LINEAR1_SHARES = (1, 1, 1, 4)  # the MLP is four times as wide as the model
NUM_CLIP_LAYERS, NUM_T5_BLOCKS, NUM_APPROXIMATOR_LAYERS = 12, 24, 5
MODULATION = ("_mod.lin", ".modulation.lin", ".adaLN_modulation.1")  # ends of the paths that Chroma lacks
VECTORS = ("time_in.", "guidance_in.", "vector_in.")  # prefixes of the paths of FLUX.1's modulation
PROCESSORS = {  # names in XLabs's trainer -> the layers whose outputs they change
    "qkv_lora1": "img_attn.qkv", "proj_lora1": "img_attn.proj",
    "qkv_lora2": "txt_attn.qkv", "proj_lora2": "txt_attn.proj", "proj_lora": "linear2",
}  # fmt: skip


def flux_paths() -> Iterator[str]:
    """Yield the path of every Linear layer of FLUX.1."""
    yield from (path for path in KEYS.linear_paths(NUM_BLOCKS) if not path.startswith(APPROXIMATOR))


def chroma_paths() -> Iterator[str]:
    """Yield the path of every Linear layer of Chroma, whose approximator replaces all modulation layers."""
    for path in KEYS.linear_paths({**NUM_BLOCKS, f"{APPROXIMATOR}layers": NUM_APPROXIMATOR_LAYERS}):
        if not path.startswith(VECTORS) and not path.endswith(MODULATION):
            yield path


def denoiser_module(path: str) -> ModuleNames:
    xlabs_names = (f"diffusion_model.{path.removesuffix(layer)}processor.{name}"
           for name, layer in PROCESSORS.items() if path.endswith(f".{layer}"))  # fmt: skip
    shares = LINEAR1_SHARES if path.endswith(".linear1") else ()
    return name_layer(
        path, KEYS.sources(path), shares=shares, aliases=tuple(xlabs_names), swaps_pair=path == KEYS.swapped
    )


def clip_module(path: str) -> ModuleNames:
    return clip_names.clip_module(path, "lora_te1", "clip_l", "text_encoder")


def t5_module(path: str) -> ModuleNames:
    # Trainers that number the encoders without a gap have T5 as the second, sd-scripts as the third.
    aliases = (f"lora_te2_{path.replace('.', '_')}",)
    return text_module(path, "lora_te3", "t5xxl", "text_encoder_2", aliases)


def chroma_t5_module(path: str) -> ModuleNames:
    """Name a module of Chroma's T5. It is the only text encoder, so OneTrainer does not number it."""
    names = t5_module(path)
    return replace(names, aliases=(*names.aliases, f"lora_te_{path.replace('.', '_')}"))


NAMES = BaseNames(
    "flux",
    (
        *map(denoiser_module, flux_paths()),
        *(clip_module(f"encoder.layers.{n}.{name}") for n in range(NUM_CLIP_LAYERS) for name in clip_names.CLIP_LINEAR),
        *(t5_module(f"encoder.block.{n}.{name}") for n in range(NUM_T5_BLOCKS) for name in T5_LINEAR),
    ),
)


CHROMA_NAMES = BaseNames(
    "chroma",
    (
        *map(denoiser_module, chroma_paths()),
        *(chroma_t5_module(f"encoder.block.{n}.{name}") for n in range(NUM_T5_BLOCKS) for name in T5_LINEAR),
    ),
)
