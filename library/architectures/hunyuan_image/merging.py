"""HunyuanImage 2.1 checkpoints for merging and extracting adapters: the transformer's file."""

from functools import partial
from pathlib import Path

from torch import nn

from library.architectures.hunyuan_image.adapter_names import denoiser_module
from library.architectures.hunyuan_image.checkpoint_keys import DIFFUSERS_MARK, DOUBLE, SINGLE
from library.architectures.hunyuan_image.load import GLYPH_MARK
from library.architectures.hunyuan_image.model import HunyuanImage, read_config
from library.architectures.hunyuan_image.targets import view
from library.checkpoints.adapter_names import ModuleNames
from library.checkpoints.base_model import BaseModel, of_single_file, open_original
from library.checkpoints.weights import configure, with_prefix
from library.errors import UserError
from library.models.identify import DENOISER_PREFIXES
from library.models.loading import on_meta_device

STACKS = ("double_blocks.", "single_blocks.")
LAYERS = tuple(f".{layer}" for layer in (*DOUBLE, *SINGLE) if not layer.endswith("_norm"))


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file in the original layout; only its header is read.

    Raises UserError naming `flag` if it is missing, broken or of another kind.
    """
    weights, prefix = open_original(flag, path, "HunyuanImage", DENOISER_PREFIXES, DIFFUSERS_MARK)
    if prefix + GLYPH_MARK not in weights.shapes:
        raise UserError(f"{flag} {path} has no layers of HunyuanImage 2.1's transformer")
    return of_single_file(path, weights, partial(names_of, prefix=prefix), "hunyuan_image", "hunyuan-image-2.1")


def names_of(stem: str, prefix: str) -> ModuleNames | None:
    """Return the names of the layer that a weight of the file belongs to; None if adapters do not target it."""
    path = stem.removeprefix(prefix)
    is_layer = path.startswith(STACKS) and path.endswith(LAYERS)
    return denoiser_module(path) if stem.startswith(prefix) and is_layer else None


def seen_by_networks(path: Path) -> tuple[list[nn.Module], nn.Module]:
    """Return ([], transformer) of a checkpoint as network modules see it, on the meta device."""
    weights, prefix = open_original("the checkpoint", path, "HunyuanImage", DENOISER_PREFIXES, DIFFUSERS_MARK)
    return view([], on_meta_device(HunyuanImage, configure(with_prefix(weights, prefix), read_config)))
