"""The names of the layers of FLUX.2 in adapter files.

Module paths are those of the original checkpoint. ai-toolkit writes them in the generic naming, musubi-tuner in
kohya's, SimpleTuner and OneTrainer write diffusers' paths.
"""

from library.architectures.flux_2.checkpoint_keys import KEYS
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.models.layer_keys import KOHYA_PREFIX, name_layer

NUM_BLOCKS = {"double_blocks": 8, "single_blocks": 48}  # of dev; klein has fewer


def denoiser_module(path: str) -> ModuleNames:
    return name_layer(
        path, KEYS.sources(path), others=("diffusion_model.", KOHYA_PREFIX), swaps_pair=path == KEYS.swapped
    )


NAMES = BaseNames("flux_2", tuple(map(denoiser_module, KEYS.linear_paths(NUM_BLOCKS))), saved_naming="generic")
