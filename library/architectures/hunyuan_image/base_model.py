"""HunyuanImage 2.1 checkpoints for merging adapters into them: the transformer's file."""

from pathlib import Path

from library.architectures.hunyuan_image.adapter_names import denoiser_module
from library.architectures.hunyuan_image.keys import DIFFUSERS_MARK, DOUBLE, SINGLE
from library.architectures.hunyuan_image.load import DENOISER_PREFIXES, GLYPH_MARK
from library.checkpoints import sources
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.checkpoints.base_model import BaseModel, WeightFile

STACKS = ("double_blocks.", "single_blocks.")
LAYERS = tuple(f".{layer}" for layer in (*DOUBLE, *SINGLE) if not layer.endswith("_norm"))


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file in the original layout; only its header is read.

    Raises ValueError naming `flag` when it is missing, broken or of another kind.
    """
    if path.is_dir():
        raise ValueError(
            f"{flag} {path}: of HunyuanImage only files in the original layout are merged into; give such a file"
        )
    weights = sources.open_file(flag, path)
    prefix = next(p for p in DENOISER_PREFIXES if any(key.startswith(p) for key in weights.shapes))
    if prefix + DIFFUSERS_MARK in weights.shapes:
        raise ValueError(
            f"{flag} {path}: this is a transformer in diffusers' layout; give a file in the original layout, which is "
            "what programs load"
        )
    if prefix + GLYPH_MARK not in weights.shapes:
        raise ValueError(f"{flag} {path} has no layer of HunyuanImage 2.1's transformer")
    stems = sorted(key.removesuffix(".weight") for key in weights.shapes if key.endswith(".weight"))
    found = {stem: names for stem in stems if (names := names_of(stem, prefix)) is not None}
    return BaseModel(
        path,
        (WeightFile("", weights, {names.kohya: stem for stem, names in found.items()}),),
        BaseNames("hunyuan_image", tuple(found.values())),
        "hunyuan-image-2.1",
    )


def names_of(stem: str, prefix: str) -> ModuleNames | None:
    """The names of the layer that a weight of the file belongs to; None where adapters change none."""
    path = stem.removeprefix(prefix)
    is_layer = path.startswith(STACKS) and path.endswith(LAYERS)
    return denoiser_module(path) if stem.startswith(prefix) and is_layer else None
