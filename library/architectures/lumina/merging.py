"""Lumina Image 2.0 checkpoints for merging and extracting adapters: the transformer's file, or one file with
everything."""

from functools import partial
from pathlib import Path

from torch import nn

from library.architectures.lumina.adapter_names import GEMMA_LAYER, denoiser_module, gemma_module
from library.architectures.lumina.checkpoint_keys import DIFFUSERS_MARK, KEYS
from library.architectures.lumina.gemma import GEMMA_PREFIXES
from library.architectures.lumina.load import MARK, MODEL
from library.architectures.lumina.model import NextDiT, read_config
from library.checkpoints.adapter_names import ModuleNames
from library.checkpoints.base_model import BaseModel, of_single_file
from library.checkpoints.weights import configure, with_prefix
from library.models.loading import on_meta_device
from library.models.transformer_file import names_below, open_transformer_file


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file in the original layout; only its header is read.

    Raises UserError naming `flag` if it is missing, broken or of another kind.
    """
    weights, prefix = open_transformer_file(flag, path, MODEL, MARK, DIFFUSERS_MARK)
    return of_single_file(path, weights, partial(target_names, prefix=prefix), "lumina", "lumina-2")


def target_names(stem: str, prefix: str) -> ModuleNames | None:
    """Return the names of the layer that a weight of the file belongs to; None if adapters do not target it."""
    gemma = GEMMA_PREFIXES[0]
    if stem.startswith(gemma):
        return gemma_module(stem.removeprefix(gemma)) if stem.endswith(GEMMA_LAYER) else None
    return names_below(prefix, KEYS.is_linear, denoiser_module)(stem)


def seen_by_networks(path: Path) -> tuple[list[nn.Module], nn.Module]:
    """Return ([], transformer) of a checkpoint as network modules see it, on the meta device."""
    weights, prefix = open_transformer_file("the checkpoint", path, MODEL, MARK, DIFFUSERS_MARK)
    return [], on_meta_device(NextDiT, configure(with_prefix(weights, prefix), read_config))
