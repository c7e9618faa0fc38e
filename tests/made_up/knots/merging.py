"""Knots checkpoints for merging and extracting adapters."""

from pathlib import Path

from torch import nn

from library.architectures.knots.layers import LAYERS, denoiser_module, text_module, view
from library.architectures.knots.load import DENOISER_PREFIX, TEXT_PREFIX, open_denoiser
from library.architectures.knots.model import Knots, read_config
from library.checkpoints.adapter_names import ModuleNames
from library.checkpoints.base_model import BaseModel, open_single_file
from library.checkpoints.weights import configure
from library.models.loading import build_on_meta_device


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a checkpoint; only its header is read. Raises UserError naming `flag` for another kind of file."""
    checkpoint, _ = open_denoiser(flag, path)
    return open_single_file(path, checkpoint, names_of, "knots", "knots-1")


def names_of(stem: str) -> ModuleNames | None:
    """Return the names of the layer that a weight belongs to, or None if adapters do not change it."""
    if stem == f"{TEXT_PREFIX}project":
        return text_module("project")
    return denoiser_module(stem.removeprefix(DENOISER_PREFIX)) if stem.endswith(LAYERS) else None


def view_for_networks(path: Path) -> tuple[list[nn.Module], nn.Module]:
    """Return ([], denoiser) of a checkpoint as network modules see it, on the meta device."""
    _, denoiser = open_denoiser("the checkpoint", path)
    return [], view([], build_on_meta_device(Knots, configure(denoiser, read_config)))[1]
