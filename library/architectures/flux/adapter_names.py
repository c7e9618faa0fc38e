"""The names of the layers of FLUX.1 and Chroma in adapter files.

Module paths are those of the original checkpoint.
"""

from collections.abc import Iterator
from dataclasses import replace

from library.architectures.flux.checkpoint_keys import APPROXIMATOR, KEYS, sources
from library.checkpoints.adapter_names import BaseNames, ModuleNames, Piece, text_module
from library.models.clip import names as clip_names
from library.models.double_stream_keys import SWAPPED
from library.models.t5 import T5_LINEAR

NUM_BLOCKS = {"double_blocks": 19, "single_blocks": 38}
QKV_SHARES = (1, 1, 1)
LINEAR1_SHARES = (1, 1, 1, 4)  # the MLP is four times as wide as the model
NUM_CLIP_LAYERS, NUM_T5_BLOCKS, NUM_APPROXIMATOR_LAYERS = 12, 24, 5
MODULATION = ("_mod.lin", ".modulation.lin", ".adaLN_modulation.1")  # endings of paths that Chroma lacks
VECTORS = ("time_in.", "guidance_in.", "vector_in.")  # prefixes of the paths of FLUX.1's modulation
PROCESSORS = {  # names of XLabs's trainer -> the layers whose outputs they change
    "qkv_lora1": "img_attn.qkv", "proj_lora1": "img_attn.proj",
    "qkv_lora2": "txt_attn.qkv", "proj_lora2": "txt_attn.proj", "proj_lora": "linear2",
}  # fmt: skip


def chroma_paths() -> Iterator[str]:
    """Yield the path of every Linear layer of Chroma, whose approximator replaces all modulation layers."""
    yield from (
        path for path in KEYS.linear_paths(NUM_BLOCKS) if not path.startswith(VECTORS) and not path.endswith(MODULATION)
    )
    yield from (f"{APPROXIMATOR}{side}_proj" for side in ("in", "out"))
    layers = [f"{APPROXIMATOR}layers.{number}" for number in range(NUM_APPROXIMATOR_LAYERS)]
    yield from (f"{layer}.{side}_layer" for layer in layers for side in ("in", "out"))


def denoiser_module(path: str) -> ModuleNames:
    found = sources(path)
    shares = LINEAR1_SHARES if path.endswith(".linear1") else QKV_SHARES
    whole = f"transformer.{found[0]}"
    own = (f"diffusion_model.{path.removesuffix(layer)}processor.{name}"
           for name, layer in PROCESSORS.items() if path.endswith(f".{layer}"))  # fmt: skip
    pieces = tuple(Piece(f"transformer.{name}", share) for name, share in zip(found, shares, strict=False))
    return ModuleNames(
        kohya=f"lora_unet_{path.replace('.', '_')}",
        generic=f"diffusion_model.{path}",
        diffusers=whole if len(found) == 1 else pieces,
        aliases=tuple(own),
        swaps_pair=path == SWAPPED,
    )


def clip_module(path: str) -> ModuleNames:
    return clip_names.clip_module(path, "lora_te1", "clip_l", "text_encoder")


def t5_module(path: str) -> ModuleNames:
    aliases = (f"lora_te2_{path.replace('.', '_')}",)
    return text_module(path, "lora_te3", "t5xxl", "text_encoder_2", aliases)


def chroma_t5_module(path: str) -> ModuleNames:
    """Name a module of Chroma's T5: its only text encoder, which OneTrainer therefore does not number."""
    found = t5_module(path)
    return replace(found, aliases=(*found.aliases, f"lora_te_{path.replace('.', '_')}"))


NAMES = BaseNames(
    "flux",
    (
        *map(denoiser_module, KEYS.linear_paths(NUM_BLOCKS)),
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
