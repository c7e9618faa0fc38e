"""The names of the layers of Qwen-Image 2.1 in adapter files.

Module paths are those of diffusers, which ComfyUI shares.
"""

from library.architectures.qwen_image_21.checkpoint_keys import FUSED, PARTS, linear_paths
from library.checkpoints.adapter_names import BaseNames, ModuleNames, Piece

NUM_BLOCKS = 32


def denoiser_module(path: str) -> ModuleNames:
    """Name a layer; one that ComfyUI's files fuse has the names of its parts."""
    whole = not path.endswith(FUSED)
    names = tuple(path.replace(FUSED, part) for part in PARTS)
    return ModuleNames(
        kohya=kohya_name(path),
        generic=f"diffusion_model.{path}",
        diffusers=f"transformer.{path}"
        if whole
        else tuple(Piece(f"transformer.{name}", 1, (f"diffusion_model.{name}", kohya_name(name))) for name in names),
    )


def kohya_name(path: str) -> str:
    return f"lora_unet_{path.replace('.', '_')}"


NAMES = BaseNames("qwen_image_21", tuple(map(denoiser_module, linear_paths(NUM_BLOCKS))))
