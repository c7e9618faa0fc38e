"""The names of the layers of HunyuanImage 2.1 in adapter files: those of ComfyUI's model."""

from library.architectures.hunyuan_image.checkpoint_keys import BLOCKS, KEYS, from_original
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.models.layer_keys import name_layer, underscore

NUM_BLOCKS = {"double_blocks": 20, "single_blocks": 40}
LINEAR1_SHARES = (1, 1, 1, 4)  # the MLP is four times as wide as the model


def is_target(path: str) -> bool:
    """Return True for the original path of a layer that adapters target: the Linear layers of the blocks."""
    return path.startswith(BLOCKS) and KEYS.is_linear(path)


def denoiser_module(path: str) -> ModuleNames:
    """Name a layer by its original path, which sd-scripts uses; our files use the names of ComfyUI's model."""
    original_name, comfy_path = underscore(path), from_original(path)
    shares = LINEAR1_SHARES if path.endswith(".linear1") else ()
    aliases = (original_name,) if original_name != underscore(comfy_path) else ()
    return name_layer(comfy_path, KEYS.sources(path), shares=shares, aliases=aliases)


PATHS = filter(is_target, KEYS.linear_paths(NUM_BLOCKS))
NAMES = BaseNames("hunyuan_image", tuple(map(denoiser_module, PATHS)))
