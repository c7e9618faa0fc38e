"""The names of the layers of Z-Image in adapter files.

Module paths are those of the original checkpoint. What we call diffusers' naming here are its paths below
`diffusion_model.`, which diffusers and ComfyUI both read; trainers write them below other prefixes too.
"""

from library.architectures.zimage.checkpoint_keys import KEYS
from library.checkpoints.adapter_names import BaseNames, ModuleNames, Piece

NUM_BLOCKS = {"context_refiner": 2, "noise_refiner": 2, "layers": 30}


def other_names(path: str) -> tuple[str, ...]:
    """Return the names by which diffusers, OneTrainer and SimpleTuner, and musubi-tuner know a layer of diffusers."""
    return f"transformer.{path}", f"lora_unet_{path.replace('.', '_')}"


def denoiser_module(path: str) -> ModuleNames:
    found = KEYS.sources(path)
    if len(found) > 1:
        pieces = tuple(Piece(f"diffusion_model.{name}", 1, other_names(name)) for name in found)
        return ModuleNames(f"lora_unet_{path.replace('.', '_')}", f"diffusion_model.{path}", pieces)
    return ModuleNames(
        kohya=f"lora_unet_{path.replace('.', '_')}",
        generic=f"diffusion_model.{path}",
        diffusers=f"diffusion_model.{found[0]}",
        aliases=other_names(found[0]),
    )


NAMES = BaseNames("zimage", tuple(map(denoiser_module, KEYS.linear_paths(NUM_BLOCKS))))
