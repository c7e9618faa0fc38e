"""Anima checkpoints for merging and extracting adapters: the transformer's file, which contains the text adapter."""

from functools import partial
from pathlib import Path

from torch import nn

from library.architectures.anima.layers import ADAPTER_BLOCK, BLOCK, TOP, denoiser_module, qwen3_module
from library.architectures.anima.load import ADAPTER_MARK, MARK, PREFIXES, QWEN3
from library.architectures.anima.model import Anima, read_config
from library.base.errors import about, of_file
from library.checkpoints import model_lookup
from library.checkpoints.adapter_names import ModuleNames
from library.checkpoints.base_model import BaseModel, open_single_file
from library.checkpoints.weights import configure, with_prefix
from library.models.language_models import LAYER_LINEAR
from library.models.loading import build_on_meta_device


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file in the original layout; only its header is read.

    Raises UserError naming `flag` if it is missing, broken or of another kind.
    """
    if path.is_dir():
        raise about(flag, path)("is a folder; for Anima use the transformer's file")
    weights = model_lookup.open_file(flag, path)
    # A file with the text adapter alone can be merged into, too.
    marks = (MARK, f"llm_adapter.{ADAPTER_MARK}")
    prefix = next((p for p in PREFIXES if any(p + mark in weights.shapes for mark in marks)), None)
    if prefix is None:
        raise about(flag, path)("has no layers of Anima's transformer")
    return open_single_file(path, weights, partial(target_names, prefix=prefix), "anima", "anima-preview")


def target_names(stem: str, prefix: str) -> ModuleNames | None:
    """Return the names of the layer that a weight of the file belongs to; None if adapters do not target it."""
    if stem.startswith(QWEN3.prefix):
        return qwen3_module(stem.removeprefix(QWEN3.prefix)) if stem.endswith(LAYER_LINEAR) else None
    path = stem.removeprefix(prefix)
    stack, _, block_path = path.rpartition("blocks.")
    layers = {"": tuple(BLOCK), "llm_adapter.": ADAPTER_BLOCK}.get(stack, ())
    is_layer = block_path.partition(".")[2] in layers or path in TOP
    return denoiser_module(path) if stem.startswith(prefix) and is_layer and not path.endswith("_norm") else None


def view_for_networks(path: Path) -> tuple[list[nn.Module], nn.Module]:
    """Return ([], transformer) of a checkpoint as network modules see it, on the meta device.

    Raises UserError for a file with only the text adapter.
    """
    weights = model_lookup.open_file("the checkpoint", path)
    prefix = next((p for p in PREFIXES if p + MARK in weights.shapes), None)
    if prefix is None:
        raise of_file(path)("contains only the text adapter", "use the transformer's file")
    return [], build_on_meta_device(Anima, configure(with_prefix(weights, prefix), read_config))
