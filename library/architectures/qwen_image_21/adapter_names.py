"""The names of the layers of Qwen-Image 2.1 in adapter files.

Module paths are those of diffusers. ComfyUI has them too, except for the gate, which its files fuse with `proj`. Its
loader finds these two layers, for every kind of adapter, only below `transformer.`, and the fused layer only under the
other names.
"""

from library.architectures.qwen_image_21.checkpoint_keys import FUSED, PARTS, linear_paths
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.models.layer_keys import KOHYA_PREFIX, name_layer

NUM_BLOCKS = 32


def denoiser_module(path: str) -> ModuleNames:
    """Name a layer; a layer that ComfyUI's files fuse gets the names of its two parts."""
    if not path.endswith(FUSED):
        return name_layer(path, (path,))
    parts = [path.replace(FUSED, part) for part in PARTS]
    return name_layer(path, parts, others=("diffusion_model.", KOHYA_PREFIX))


NAMES = BaseNames(
    "qwen_image_21",
    tuple(map(denoiser_module, linear_paths(NUM_BLOCKS))),
    fused=((FUSED, PARTS),),
    saved_naming="diffusers",
    holds_all_kinds_in_diffusers=True,
)
