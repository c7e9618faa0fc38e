"""The names of the layers of Stable Diffusion XL in adapter files.

Files name the U-Net's layers after the single-file layout (`input_blocks_4_1_...`), but diffusers' model has other
paths. Network modules therefore get a view: a tree with the paths of files that contains the real layers and attention
blocks.
"""

from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.models.clip import names as clip_names
from library.models.unet import names as unet_names
from library.models.unet.checkpoint_keys import UnetLayout

LAYOUT = UnetLayout(layers_per_block=2, has_attention=(False, True, True))
DEPTHS = (0, 2, 10)
ENCODERS = (("lora_te1", "clip_l", "text_encoder"), ("lora_te2", "clip_g", "text_encoder_2"))
NUM_LAYERS = (12, 32)


def unet_module(path: str, layout: UnetLayout = LAYOUT) -> ModuleNames:
    return unet_names.unet_module(path, layout, named_after_file=True)


def clip_module(path: str, encoder: int) -> ModuleNames:
    """Name one module of the first (0) or second (1) text encoder."""
    return clip_names.clip_module(path, *ENCODERS[encoder])


NAMES = BaseNames(
    "sdxl",
    (
        *map(unet_module, (*unet_names.unet_paths(LAYOUT, DEPTHS), *unet_names.SIZE_EMBEDDING)),
        *(clip_module(path, 0) for path in clip_names.clip_paths(NUM_LAYERS[0])),
        *(clip_module(path, 1) for path in clip_names.clip_paths(NUM_LAYERS[1])),
    ),
)
