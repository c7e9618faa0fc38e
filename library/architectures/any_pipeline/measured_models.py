"""The models of a folder as a measurement holds them: few blocks, or one block or text encoder at a time."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from library.architectures.any_pipeline.folder import PipelineFolder
from library.architectures.any_pipeline.targets import block_lists
from library.architectures.any_pipeline.watch import Watched
from library.base.errors import about
from library.base.formatting import format_gib
from library.checkpoints.weights import Weights, select_weights
from library.memory.devices import DTYPES
from library.models.loading import materialise, text_encoder_dtype

Shapes = Mapping[str, tuple[int, ...]]
MOST_TEXT_BYTES = 4 << 30  # of text encoders in memory together


def load_shortened(folder: PipelineFolder, name: str) -> nn.Module:
    """Load a denoiser with the first of each list of repeated blocks, float32: enough to measure how it is called."""
    model, shapes = shorten(folder, name)
    weights = select_weights(folder.open(name).weights, dict(zip(shapes, shapes, strict=True)))
    return materialise(model, weights, torch.float32)


def shorten(folder: PipelineFolder, name: str) -> tuple[nn.Module, Shapes]:
    """Return a denoiser with the first of each list of repeated blocks, on the meta device, and the shapes of its
    weights."""
    model = folder.build_empty(name)
    for blocks in block_lists(model):
        del blocks[1:]
    return model, {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def load_streamed(folder: PipelineFolder, name: str) -> nn.Module:
    """Load a denoiser, float32, whose repeated blocks are read for each of their calls, one at a time."""
    model, weights = folder.build_empty(name), folder.open(name).weights
    paths = {block: path for path, block in model.named_modules()}
    blocks = {paths[block]: block for blocks in block_lists(model) for block in blocks}
    rest = {key: key for key in model.state_dict() if not key.startswith(tuple(f"{path}." for path in blocks))}
    for path in blocks:
        model.set_submodule(path, nn.Identity())
    materialise(model, select_weights(weights, rest), torch.float32)
    for path, block in blocks.items():
        model.set_submodule(path, block.requires_grad_(False).eval())
        own = select_weights(weights, {key: f"{path}.{key}" for key in block.state_dict()})
        empty = block.state_dict()
        block.register_forward_pre_hook(partial(fill_block, own))
        block.register_forward_hook(partial(empty_block, empty))
    return model


def fill_block(weights: Weights, block: nn.Module, _: Any) -> None:
    materialise(block, weights, torch.float32)


def empty_block(state: Mapping[str, Any], block: nn.Module, *_: Any) -> None:
    block.load_state_dict(state, assign=True)


def load_for_measuring(folder: PipelineFolder, whole: bool = False) -> dict[str, nn.Module]:
    """Load the VAE, and the denoisers shortened or, if their code needs all blocks, `whole`, a block at a time."""
    load_denoiser = load_streamed if whole else load_shortened
    models = {name: load_denoiser(folder, name) for name in folder.denoisers if name in folder.used}
    if folder.vae is not None:
        models[folder.vae] = folder.load(folder.vae, torch.float32)
    return models


def require_memory(folder: PipelineFolder, texts: "TextReader") -> int:
    """Return the bytes of main memory that the weights of a measurement take. Raises UserError if they are not free."""
    import psutil

    parts = [shorten(folder, name)[1] for name in folder.denoisers if name in folder.used]
    parts += [] if folder.vae is None else [folder.open(folder.vae).weights.shapes]
    size = torch.float32.itemsize * sum(math.prod(shape) for part in parts for shape in part.values())
    needed, free = texts.resident_bytes + size, psutil.virtual_memory().available
    if needed > free:
        lack = f"takes {format_gib(needed)} of main memory, and {format_gib(free)} are free"
        reason = f": measuring {folder.kind.__name__} {lack}"
        raise about(folder.flag, folder.path, cause="does not fit")(reason, "close other programs")
    return needed


@dataclass(frozen=True)
class TextReader:
    """Loads text encoders for a measurement when they are called, one at a time if together they take much memory."""

    folder: PipelineFolder
    names: tuple[str, ...]
    dtype: torch.dtype

    @classmethod
    def build(cls, folder: PipelineFolder, precision: str) -> "TextReader":
        names = tuple(name for name in folder.used if name not in (*folder.denoisers, folder.vae))
        return cls(folder, names, text_encoder_dtype(DTYPES[precision]))

    @cached_property
    def sizes(self) -> list[int]:
        """The bytes of each."""
        parts = [self.folder.open(name).weights for name in self.names]
        return [sum(map(math.prod, part.shapes.values())) * self.dtype.itemsize for part in parts]

    @property
    def resident_bytes(self) -> int:
        """The most bytes in memory together."""
        return max(self.sizes) if sum(self.sizes) > MOST_TEXT_BYTES else sum(self.sizes)

    def load(self, watched: Watched, name: str) -> None:
        """Add a text encoder to the models in memory."""
        for other in self.names if self.resident_bytes < sum(self.sizes) else ():
            watched.models.pop(other, None)
        watched.models[name] = self.folder.load(name, self.dtype)
