"""FLUX.2 checkpoints for merging and extracting adapters: the transformer's file, or one file with everything."""

from pathlib import Path

from torch import nn

from library.architectures.flux_2.adapter_names import denoiser_module
from library.architectures.flux_2.assembly import modelspec_architecture
from library.architectures.flux_2.checkpoint_keys import DIFFUSERS_MARK, KEYS
from library.architectures.flux_2.load import MARK, MODEL
from library.architectures.flux_2.model import Flux2, Flux2Config, read_config
from library.architectures.flux_2.releases import recognise_release
from library.checkpoints.base_model import BaseModel, of_single_file
from library.checkpoints.weights import Weights, configure, with_prefix
from library.models.loading import on_meta_device
from library.models.transformer_file import names_below, open_transformer_file


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file in the original layout; only its header is read.

    Raises UserError naming `flag` if it is missing, broken or of another kind.
    """
    weights, prefix, config = opened(flag, path)
    architecture = modelspec_architecture(recognise_release(config, None, str(path)).name)
    return of_single_file(path, weights, names_below(prefix, KEYS.is_linear, denoiser_module), "flux_2", architecture)


def opened(flag: str, path: Path) -> tuple[Weights, str, Flux2Config]:
    """Return the weights of a file, the prefix of the transformer's, and its sizes."""
    weights, prefix = open_transformer_file(flag, path, MODEL, MARK, DIFFUSERS_MARK)
    return weights, prefix, configure(with_prefix(weights, prefix), read_config)


def seen_by_networks(path: Path) -> tuple[list[nn.Module], nn.Module]:
    """Return ([], transformer) of a checkpoint as network modules see it, on the meta device."""
    return [], on_meta_device(Flux2, opened("the checkpoint", path)[2])
