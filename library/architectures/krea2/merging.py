"""Krea 2 checkpoints for merging and extracting adapters: the transformer's file, or one file with everything."""

from pathlib import Path

from torch import nn

from library.architectures.krea2.adapter_names import denoiser_module
from library.architectures.krea2.checkpoint_keys import DIFFUSERS_MARK, MARK, is_linear
from library.architectures.krea2.load import MODEL
from library.architectures.krea2.model import SingleStreamDiT, read_config
from library.checkpoints.base_model import BaseModel, of_single_file
from library.checkpoints.weights import configure, with_prefix
from library.models.loading import on_meta_device
from library.models.transformer_file import names_below, open_transformer_file


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file in the original layout; only its header is read.

    Raises UserError naming `flag` if it is missing, broken or of another kind.
    """
    weights, prefix = open_transformer_file(flag, path, MODEL, MARK, DIFFUSERS_MARK)
    return of_single_file(path, weights, names_below(prefix, is_linear, denoiser_module), "krea2", "Krea-2")


def seen_by_networks(path: Path) -> tuple[list[nn.Module], nn.Module]:
    """Return ([], transformer) of a checkpoint as network modules see it, on the meta device."""
    weights, prefix = open_transformer_file("the checkpoint", path, MODEL, MARK, DIFFUSERS_MARK)
    return [], on_meta_device(SingleStreamDiT, configure(with_prefix(weights, prefix), read_config))
