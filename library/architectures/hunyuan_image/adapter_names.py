"""The names of the layers of HunyuanImage 2.1 in adapter files.

Files name the layers as ComfyUI's model does. The original checkpoint, which the denoiser follows, names some of them
differently, and ComfyUI drops adapters of those names without an error. So network modules see a view whose paths are
the names in files.
"""

from library.architectures.hunyuan_image.checkpoint_keys import KEYS
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.models.layer_keys import name_layer, underscore

NUM_BLOCKS = {"double_blocks": 20, "single_blocks": 40}
LINEAR1_SHARES = (1, 1, 1, 4)  # the MLP is four times as wide as the model
RENAMED = {  # child of a block -> its layers -> their names in files
    "img_mod": {"linear": "lin"},
    "txt_mod": {"linear": "lin"},
    "modulation": {"linear": "lin"},
    "img_mlp": {"fc1": "0", "fc2": "2"},
    "txt_mlp": {"fc1": "0", "fc2": "2"},
}


def is_in_block(path: str) -> bool:
    """Return True for the path of a layer of the blocks that adapters target."""
    return path.startswith(tuple(f"{stack}." for stack in NUM_BLOCKS))


def in_files(path: str) -> str:
    """Return the path of a layer in ComfyUI's model, which has each stream's attention in a separate module."""
    parent, _, layer = path.rpartition(".")
    names = RENAMED.get(parent.rpartition(".")[2], {})
    return f"{parent}.{names.get(layer, layer)}".replace("_attn_", "_attn.")


def denoiser_module(path: str) -> ModuleNames:
    """Name a module: sd-scripts follows the original checkpoint, ComfyUI, which our files follow, its own model."""
    kohya, named = underscore(path), in_files(path)
    shares = LINEAR1_SHARES if path.endswith(".linear1") else ()
    return name_layer(named, KEYS.sources(path), shares=shares, aliases=(kohya,) if kohya != underscore(named) else ())


PATHS = filter(is_in_block, KEYS.linear_paths(NUM_BLOCKS))
NAMES = BaseNames("hunyuan_image", tuple(map(denoiser_module, PATHS)))
