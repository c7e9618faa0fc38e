"""Anima checkpoints for merging adapters into them and extracting adapters from them: the transformer's file, whose
text adapter is part of it."""

from functools import partial
from pathlib import Path

from torch import nn

from library.architectures.anima.adapters import ADAPTER_BLOCK, TEXT_LAYER, denoiser_module, text_module
from library.architectures.anima.checkpoint_keys import BLOCK, TOP
from library.architectures.anima.load import ADAPTER_MARK, MARK, PREFIXES
from library.architectures.anima.model import Anima, read_config
from library.architectures.anima.qwen3 import PREFIXES as QWEN3_PREFIXES
from library.checkpoints import model_lookup
from library.checkpoints.adapter_names import ModuleNames
from library.checkpoints.base_model import BaseModel, of_single_file
from library.checkpoints.weights import configure, with_prefix
from library.errors import UserError
from library.models.loading import on_meta_device


def open_base_model(flag: str, path: Path) -> BaseModel:
    """Open a single file in the original layout; only its header is read.

    Raises UserError naming `flag` when it is missing, broken or of another kind.
    """
    if path.is_dir():
        raise UserError(f"{flag} {path}: of Anima only the transformer's file is merged into; give that")
    weights = model_lookup.open_file(flag, path)
    marks = (MARK, f"llm_adapter.{ADAPTER_MARK}")
    prefix = next((p for p in PREFIXES if any(p + mark in weights.shapes for mark in marks)), None)
    if prefix is None:
        raise UserError(f"{flag} {path} has no layer of Anima's transformer")
    return of_single_file(path, weights, partial(names_of, prefix=prefix), "anima", "anima-preview")


def names_of(stem: str, prefix: str) -> ModuleNames | None:
    """The names of the layer that a weight of the file belongs to; None where adapters change none."""
    qwen3 = QWEN3_PREFIXES[0]
    if stem.startswith(qwen3):
        return text_module(stem.removeprefix(qwen3)) if stem.endswith(TEXT_LAYER) else None
    path = stem.removeprefix(prefix)
    stack, _, rest = path.rpartition("blocks.")
    layers = {"": tuple(BLOCK), "llm_adapter.": ADAPTER_BLOCK}.get(stack, ())
    is_layer = rest.partition(".")[2] in layers or path in TOP
    return denoiser_module(path) if stem.startswith(prefix) and is_layer and not path.endswith("_norm") else None


def seen_by_networks(path: Path) -> tuple[list[nn.Module], nn.Module]:
    """([], transformer) of a checkpoint as network modules see it, on the meta device.

    Raises UserError for a file of the text adapter alone.
    """
    weights = model_lookup.open_file("the checkpoint", path)
    prefix = next((p for p in PREFIXES if p + MARK in weights.shapes), None)
    if prefix is None:
        raise UserError(f"{path} holds the text adapter alone; give the transformer's file")
    return [], on_meta_device(Anima, configure(with_prefix(weights, prefix), read_config))
