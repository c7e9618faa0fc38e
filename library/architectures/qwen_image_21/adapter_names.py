"""The names of the layers of Qwen-Image 2.1 in adapter files.

Module paths are those of diffusers, which ComfyUI shares but for the gate, which its files fuse with `proj`. Its loader
finds the two under `transformer.` alone, for every kind of adapter, and the fused layer under the other names.
"""

from library.architectures.qwen_image_21.checkpoint_keys import FUSED, PARTS, linear_paths
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.models.layer_keys import KOHYA_PREFIX, name_layer

NUM_BLOCKS = 32


def denoiser_module(path: str) -> ModuleNames:
    """Name a layer; one that ComfyUI's files fuse has the names of its parts."""
    if not path.endswith(FUSED):
        return name_layer(path, (path,))
    parts = [path.replace(FUSED, part) for part in PARTS]
    return name_layer(path, parts, others=("diffusion_model.", KOHYA_PREFIX))


NAMES = BaseNames(
    "qwen_image_21",
    tuple(map(denoiser_module, linear_paths(NUM_BLOCKS))),
    fused=((FUSED, PARTS),),
    holds_all_kinds_in_diffusers=True,
)
