"""The modules of HunyuanImage 2.1 under the three names that adapter files give them."""

from collections.abc import Iterator

from library.architectures.hunyuan_image.keys import DOUBLE, SINGLE, sources
from library.checkpoints.adapter_names import BaseNames, ModuleNames, Piece

NUM_BLOCKS = {"double_blocks": 20, "single_blocks": 40}
QKV_SHARES = (1, 1, 1)
LINEAR1_SHARES = (1, 1, 1, 4)  # the MLP is four times as wide as the model
RENAMED = {  # block's child -> its layers and their names in files
    "img_mod": {"linear": "lin"},
    "txt_mod": {"linear": "lin"},
    "modulation": {"linear": "lin"},
    "img_mlp": {"fc1": "0", "fc2": "2"},
    "txt_mlp": {"fc1": "0", "fc2": "2"},
}


def denoiser_paths() -> Iterator[str]:
    """Path in the original checkpoint of every Linear layer of the blocks."""
    for stack, layers in (("double_blocks", DOUBLE), ("single_blocks", SINGLE)):
        for number in range(NUM_BLOCKS[stack]):
            yield from (f"{stack}.{number}.{layer}" for layer in layers if not layer.endswith("_norm"))


def in_files(path: str) -> str:
    """The path in files of a layer of the denoiser."""
    parent, _, layer = path.rpartition(".")
    names = RENAMED.get(parent.rpartition(".")[2], {})
    return f"{parent}.{names.get(layer, layer)}"


def denoiser_module(path: str) -> ModuleNames:
    """sd-scripts names layers as the original checkpoint does, ComfyUI, which our files follow, as its own model."""
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
    """The path in ComfyUI's model, which has the attention of each stream in a module of its own."""
    return named.replace("_attn_", "_attn.")


NAMES = BaseNames("hunyuan_image", tuple(map(denoiser_module, denoiser_paths())))
