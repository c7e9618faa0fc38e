"""FLUX.2 checkpoints for merging and extracting adapters: the transformer's file, or one file with everything."""

from functools import partial
from pathlib import Path

from torch import nn

from library.architectures.flux_2.adapter_names import denoiser_module
from library.architectures.flux_2.assembly import architecture_of
from library.architectures.flux_2.checkpoint_keys import DIFFUSERS_MARK, KEYS
from library.architectures.flux_2.load import MARK, MODEL
from library.architectures.flux_2.model import Flux2, Flux2Config, read_config
from library.architectures.flux_2.releases import release_of
from library.architectures.flux_2.targets import view
from library.checkpoints.adapter_names import ModuleNames
from library.checkpoints.base_model import BaseModel, of_single_file, open_original
from library.checkpoints.weights import Weights, configure, with_prefix
from library.errors import UserError
from library.models.identify import DENOISER_PREFIXES
from library.models.loading import on_meta_device


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file in the original layout; only its header is read.

    Raises UserError naming `flag` if it is missing, broken or of another kind.
    """
    weights, prefix, config = opened(flag, path)
    architecture = architecture_of(release_of(config, None, str(path)).name)
    return of_single_file(path, weights, partial(names_of, prefix=prefix), "flux_2", architecture)


def opened(flag: str, path: Path) -> tuple[Weights, str, Flux2Config]:
    """Return the weights of a file, the prefix of the transformer's, and its sizes."""
    weights, prefix = open_original(flag, path, MODEL, DENOISER_PREFIXES, DIFFUSERS_MARK)
    if prefix + MARK not in weights.shapes:
        raise UserError(f"{flag} {path} has no layers of {MODEL}'s transformer")
    return weights, prefix, configure(with_prefix(weights, prefix), read_config)


def names_of(stem: str, prefix: str) -> ModuleNames | None:
    """Return the names of the layer that a weight of the file belongs to; None if adapters do not target it."""
    path = stem.removeprefix(prefix)
    return denoiser_module(path) if stem.startswith(prefix) and KEYS.is_linear(path) else None


def seen_by_networks(path: Path) -> tuple[list[nn.Module], nn.Module]:
    """Return ([], transformer) of a checkpoint as network modules see it, on the meta device."""
    return view([], on_meta_device(Flux2, opened("the checkpoint", path)[2]))
