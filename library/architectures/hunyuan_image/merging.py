"""HunyuanImage 2.1 checkpoints for merging and extracting adapters: the transformer's file."""

from pathlib import Path

from torch import nn

from library.architectures.hunyuan_image.adapter_names import denoiser_module
from library.architectures.hunyuan_image.checkpoint_keys import DIFFUSERS_MARK, DOUBLE, SINGLE
from library.architectures.hunyuan_image.load import GLYPH_MARK, MODEL
from library.architectures.hunyuan_image.model import HunyuanImage, read_config
from library.architectures.hunyuan_image.targets import view
from library.checkpoints.base_model import BaseModel, of_single_file
from library.checkpoints.weights import configure, with_prefix
from library.models.loading import on_meta_device
from library.models.transformer_file import names_below, open_transformer_file

STACKS = ("double_blocks.", "single_blocks.")
LAYERS = tuple(f".{layer}" for layer in (*DOUBLE, *SINGLE) if not layer.endswith("_norm"))


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file in the original layout; only its header is read.

    Raises UserError naming `flag` if it is missing, broken or of another kind.
    """
    weights, prefix = open_transformer_file(flag, path, MODEL, GLYPH_MARK, DIFFUSERS_MARK)
    return of_single_file(
        path, weights, names_below(prefix, is_layer, denoiser_module), "hunyuan_image", "hunyuan-image-2.1"
    )


def is_layer(path: str) -> bool:
    """Return True if adapters target the layer at a path."""
    return path.startswith(STACKS) and path.endswith(LAYERS)


def seen_by_networks(path: Path) -> tuple[list[nn.Module], nn.Module]:
    """Return ([], transformer) of a checkpoint as network modules see it, on the meta device."""
    weights, prefix = open_transformer_file("the checkpoint", path, MODEL, GLYPH_MARK, DIFFUSERS_MARK)
    return view([], on_meta_device(HunyuanImage, configure(with_prefix(weights, prefix), read_config)))
