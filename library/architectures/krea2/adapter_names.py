"""The names of the layers of Krea 2 in adapter files.

Module paths are those of the original checkpoint. ai-toolkit and the model's authors write them in the generic naming,
musubi-tuner in kohya's; SimpleTuner and OneTrainer write diffusers' paths.
"""

from library.architectures.krea2.checkpoint_keys import KEYS, NUM_BLOCKS
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.models.layer_keys import KOHYA_PREFIX, name_layer


def denoiser_module(path: str) -> ModuleNames:
    return name_layer(path, KEYS.sources(path), others=("diffusion_model.", KOHYA_PREFIX))


NAMES = BaseNames("krea2", tuple(map(denoiser_module, KEYS.linear_paths(NUM_BLOCKS))), saved_naming="generic")
