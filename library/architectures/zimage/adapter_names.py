"""The names of the layers of Z-Image in adapter files.

Module paths are those of the original checkpoint. Diffusers' naming means its paths below `diffusion_model.` here,
which both diffusers and ComfyUI read; trainers write them below other prefixes too.
"""

from library.architectures.zimage.checkpoint_keys import KEYS
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.models.layer_keys import KOHYA_PREFIX, name_layer

NUM_BLOCKS = {"context_refiner": 2, "noise_refiner": 2, "layers": 30}


def denoiser_module(path: str) -> ModuleNames:
    return name_layer(path, KEYS.sources(path), prefix="diffusion_model.", others=("transformer.", KOHYA_PREFIX))


NAMES = BaseNames("zimage", tuple(map(denoiser_module, KEYS.linear_paths(NUM_BLOCKS))), saved_naming="diffusers")
