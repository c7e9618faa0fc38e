"""Qwen-Image 2.1 checkpoints for merging and extracting adapters: a transformer's file, or one file with everything."""

from functools import partial
from pathlib import Path

from torch import nn

from library.architectures.qwen_image_21.adapter_names import denoiser_module
from library.architectures.qwen_image_21.checkpoint_keys import is_linear, split_gates
from library.architectures.qwen_image_21.load import MARK, MODEL
from library.architectures.qwen_image_21.model import QwenImage21, read_config
from library.checkpoints import model_lookup
from library.checkpoints.adapter_names import ModuleNames
from library.checkpoints.base_model import BaseModel, of_single_file
from library.checkpoints.weights import Weights, configure, find_prefix, with_prefix
from library.errors import UserError
from library.models.identify import DENOISER_PREFIXES
from library.models.loading import on_meta_device


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file; only its header is read.

    Raises UserError naming `flag` if it is missing, broken or of another kind.
    """
    weights, prefix = opened(flag, path)
    return of_single_file(path, weights, partial(names_of, prefix=prefix), "qwen_image_21", "Qwen-Image-2.1")


def opened(flag: str, path: Path) -> tuple[Weights, str]:
    """Return the weights of a file and the prefix of the transformer's."""
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; for {MODEL} merging supports only the transformer's file")
    weights = model_lookup.open_file(flag, path)
    prefix = find_prefix(weights.shapes, DENOISER_PREFIXES)
    if prefix + MARK not in weights.shapes:
        raise UserError(f"{flag} {path} has no layers of {MODEL}'s transformer")
    return weights, prefix


def names_of(stem: str, prefix: str) -> ModuleNames | None:
    """Return the names of the layer that a weight of the file belongs to; None if adapters do not target it."""
    path = stem.removeprefix(prefix)
    return denoiser_module(path) if stem.startswith(prefix) and is_linear(path) else None


def seen_by_networks(path: Path) -> tuple[list[nn.Module], nn.Module]:
    """Return ([], transformer) of a checkpoint as network modules see it, on the meta device."""
    weights, prefix = opened("the checkpoint", path)
    return [], on_meta_device(QwenImage21, configure(split_gates(with_prefix(weights, prefix)), read_config))
