"""The names of the layers of HunyuanImage 2.1 in adapter files.

Files name the layers as ComfyUI's model does. The original checkpoint, which the denoiser follows, names some of them
differently, and ComfyUI drops adapters of those names without an error. So network modules see a view whose paths are
the names in files.
"""

from collections.abc import Iterator

from library.architectures.hunyuan_image.checkpoint_keys import DOUBLE, SINGLE, sources
from library.checkpoints.adapter_names import BaseNames, ModuleNames, Piece

NUM_BLOCKS = {"double_blocks": 20, "single_blocks": 40}
QKV_SHARES = (1, 1, 1)
LINEAR1_SHARES = (1, 1, 1, 4)  # the MLP is four times as wide as the model
RENAMED = {  # child of a block -> its layers -> their names in files
    "img_mod": {"linear": "lin"},
    "txt_mod": {"linear": "lin"},
    "modulation": {"linear": "lin"},
    "img_mlp": {"fc1": "0", "fc2": "2"},
    "txt_mlp": {"fc1": "0", "fc2": "2"},
}


def denoiser_paths() -> Iterator[str]:
    """Yield the path in the original checkpoint of every Linear layer of the blocks."""
    for stack, layers in (("double_blocks", DOUBLE), ("single_blocks", SINGLE)):
        for number in range(NUM_BLOCKS[stack]):
            yield from (f"{stack}.{number}.{layer}" for layer in layers if not layer.endswith("_norm"))


def in_files(path: str) -> str:
    """Return the path of a denoiser layer in files."""
    parent, _, layer = path.rpartition(".")
    names = RENAMED.get(parent.rpartition(".")[2], {})
    return f"{parent}.{names.get(layer, layer)}"


def denoiser_module(path: str) -> ModuleNames:
    """Name a module: sd-scripts follows the original checkpoint, ComfyUI, which our files follow, its own model."""
    found = sources(path)
    shares = LINEAR1_SHARES if path.endswith(".linear1") else QKV_SHARES
    pieces = tuple(Piece(f"transformer.{name}", share) for name, share in zip(found, shares, strict=False))
    named = in_files(path)
    return ModuleNames(
        kohya=f"lora_unet_{named.replace('.', '_')}",
        generic=f"diffusion_model.{comfy_path(named)}",
        diffusers=f"transformer.{found[0]}" if len(found) == 1 else pieces,
        aliases=(f"lora_unet_{path.replace('.', '_')}",) if named != path else (),
    )


def comfy_path(named: str) -> str:
    """Return the path in ComfyUI's model, which has each stream's attention in a separate module."""
    return named.replace("_attn_", "_attn.")


NAMES = BaseNames("hunyuan_image", tuple(map(denoiser_module, denoiser_paths())))
