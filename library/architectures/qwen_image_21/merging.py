"""Qwen-Image 2.1 checkpoints for merging and extracting adapters: a transformer's file, or one file with everything."""

from pathlib import Path

from torch import nn

from library.architectures.qwen_image_21.adapter_names import denoiser_module
from library.architectures.qwen_image_21.checkpoint_keys import is_linear, split_gates
from library.architectures.qwen_image_21.load import MARK, MODEL
from library.architectures.qwen_image_21.model import QwenImage21, read_config
from library.checkpoints.base_model import BaseModel, of_single_file
from library.checkpoints.weights import configure, with_prefix
from library.models.loading import on_meta_device
from library.models.transformer_file import names_below, open_transformer_file


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file; only its header is read.

    Raises UserError naming `flag` if it is missing, broken or of another kind.
    """
    weights, prefix = open_transformer_file(flag, path, MODEL, MARK, None)
    return of_single_file(
        path, weights, names_below(prefix, is_linear, denoiser_module), "qwen_image_21", "Qwen-Image-2.1"
    )


def seen_by_networks(path: Path) -> tuple[list[nn.Module], nn.Module]:
    """Return ([], transformer) of a checkpoint as network modules see it, on the meta device."""
    weights, prefix = open_transformer_file("the checkpoint", path, MODEL, MARK, None)
    return [], on_meta_device(QwenImage21, configure(split_gates(with_prefix(weights, prefix)), read_config))
