"""The names of the layers of Stable Diffusion 1.x and 2.x in adapter files.

Module paths are diffusers' and transformers'.
"""

from functools import partial

from library.architectures.sd.load import NUM_SD2_LAYERS
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.models.clip import names as clip_names
from library.models.unet import names as unet_names
from library.models.unet.checkpoint_keys import UnetLayout

LAYOUT = UnetLayout(layers_per_block=2, has_attention=(True, True, True, False))
DEPTHS = (1, 1, 1, 1)
NUM_SD1_LAYERS = 12
# The text encoders of the two generations have the same name in kohya's and diffusers' files, but not in generic ones.
GENERIC_ENCODERS = {"sd1": "clip_l", "sd2": "clip_h"}


def unet_module(path: str, layout: UnetLayout = LAYOUT) -> ModuleNames:
    return unet_names.unet_module(path, layout, named_after_file=False)


def clip_module(path: str, base: str = "sd1") -> ModuleNames:
    return clip_names.clip_module(path, "lora_te", GENERIC_ENCODERS[base], "text_encoder")


def text_encoder_names(base: str, num_layers: int) -> BaseNames:
    unet = map(unet_module, unet_names.unet_paths(LAYOUT, DEPTHS))
    return BaseNames(base, (*unet, *map(partial(clip_module, base=base), clip_names.clip_paths(num_layers))))


NAMES = text_encoder_names("sd1", NUM_SD1_LAYERS)
SD2_NAMES = text_encoder_names("sd2", NUM_SD2_LAYERS)
