"""Z-Image checkpoints for merging and extracting adapters: the transformer's file, or one file with everything."""

from pathlib import Path

from torch import nn

from library.architectures.zimage.adapter_names import denoiser_module
from library.architectures.zimage.checkpoint_keys import DIFFUSERS_MARK, KEYS
from library.architectures.zimage.load import MARK, MODEL
from library.architectures.zimage.model import ZImage, read_config
from library.checkpoints.base_model import BaseModel, of_single_file
from library.checkpoints.weights import configure, with_prefix
from library.models.loading import on_meta_device
from library.models.transformer_file import names_below, open_transformer_file


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file in the original layout; only its header is read.

    Raises UserError naming `flag` if it is missing, broken or of another kind.
    """
    weights, prefix = open_transformer_file(flag, path, MODEL, MARK, DIFFUSERS_MARK)
    return of_single_file(path, weights, names_below(prefix, KEYS.is_linear, denoiser_module), "zimage", "Z-Image")


def seen_by_networks(path: Path) -> tuple[list[nn.Module], nn.Module]:
    """Return ([], transformer) of a checkpoint as network modules see it, on the meta device."""
    weights, prefix = open_transformer_file("the checkpoint", path, MODEL, MARK, DIFFUSERS_MARK)
    return [], on_meta_device(ZImage, configure(with_prefix(weights, prefix), read_config))
