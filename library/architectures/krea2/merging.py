"""Krea 2 checkpoints for merging and extracting adapters: the transformer's file, or one file with everything."""

from functools import partial
from pathlib import Path

from torch import nn

from library.architectures.krea2.adapter_names import denoiser_module
from library.architectures.krea2.checkpoint_keys import DIFFUSERS_MARK, MARK, is_linear
from library.architectures.krea2.load import MODEL
from library.architectures.krea2.model import SingleStreamDiT, read_config
from library.architectures.krea2.targets import view
from library.checkpoints.adapter_names import ModuleNames
from library.checkpoints.base_model import BaseModel, of_single_file, open_original
from library.checkpoints.weights import configure, with_prefix
from library.errors import UserError
from library.models.identify import DENOISER_PREFIXES
from library.models.loading import on_meta_device


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file in the original layout; only its header is read.

    Raises UserError naming `flag` if it is missing, broken or of another kind.
    """
    weights, prefix = open_original(flag, path, MODEL, DENOISER_PREFIXES, DIFFUSERS_MARK)
    if prefix + MARK not in weights.shapes:
        raise UserError(f"{flag} {path} has no layers of {MODEL}'s transformer")
    return of_single_file(path, weights, partial(names_of, prefix=prefix), "krea2", "Krea-2")


def names_of(stem: str, prefix: str) -> ModuleNames | None:
    """Return the names of the layer that a weight of the file belongs to; None if adapters do not target it."""
    path = stem.removeprefix(prefix)
    return denoiser_module(path) if stem.startswith(prefix) and is_linear(path) else None


def seen_by_networks(path: Path) -> tuple[list[nn.Module], nn.Module]:
    """Return ([], transformer) of a checkpoint as network modules see it, on the meta device."""
    weights, prefix = open_original("the checkpoint", path, MODEL, DENOISER_PREFIXES, DIFFUSERS_MARK)
    return view([], on_meta_device(SingleStreamDiT, configure(with_prefix(weights, prefix), read_config)))
