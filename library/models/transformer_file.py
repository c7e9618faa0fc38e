"""The file of a base model's transformer, for merging adapters into it and extracting them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from library.base.errors import about
from library.checkpoints import model_lookup
from library.checkpoints.adapter_names import ModuleNames
from library.checkpoints.base_model import BaseModel, open_single_file
from library.checkpoints.weights import Weights, configure, find_prefix, with_prefix
from library.models.adapter_views import view_denoiser
from library.models.identify import DENOISER_PREFIXES
from library.models.loading import build_on_meta_device
from library.models.shapes import Shapes
from library.protocols import AdapterView


@dataclass(frozen=True)
class TransformerFile:
    """A base model's transformer in one file of the original layout, which may also hold its text encoders and VAE."""

    base: str  # `BaseModelSpec.name`
    title: str  # in messages
    architecture: str | Callable[[Weights], str]  # modelspec.architecture of merged files, or a function of the weights
    mark: str  # a weight that every such transformer has
    diffusers_mark: str | None  # a weight that only diffusers' layout has
    is_layer: Callable[[str], bool]  # True for the path of a layer that adapters may target
    name: Callable[[str], ModuleNames]  # names of a layer by its path
    build: Callable[[Any], nn.Module]
    read_config: Callable[[Shapes], Any]
    view: AdapterView = view_denoiser
    name_text_layer: Callable[[str], ModuleNames | None] = lambda stem: None  # by its full name in the file

    def open(self, flag: str, path: Path) -> BaseModel:
        """Open the file; only its header is read.

        Raises UserError naming `flag` for a folder, an unreadable file, diffusers' layout and another kind of model.
        """
        weights, prefix = self.open_weights(flag, path)

        def name_target(stem: str) -> ModuleNames | None:
            layer = stem.removeprefix(prefix)
            is_layer = stem.startswith(prefix) and self.is_layer(layer)
            return self.name(layer) if is_layer else self.name_text_layer(stem)

        named = self.architecture
        architecture = named if isinstance(named, str) else named(with_prefix(weights, prefix))
        return open_single_file(path, weights, name_target, self.base, architecture)

    def view_for_networks(self, path: Path) -> tuple[list[nn.Module], nn.Module]:
        """Return ([], transformer) of a checkpoint as network modules see it, on the meta device."""
        weights, prefix = self.open_weights("the checkpoint", path)
        model = build_on_meta_device(self.build, configure(with_prefix(weights, prefix), self.read_config))
        return [], self.view([], model)[1]

    def open_weights(self, flag: str, path: Path) -> tuple[Weights, str]:
        """Return the weights of the file and the prefix of the transformer's names."""
        if path.is_dir():
            raise about(flag, path)(
                f"is a folder; for {self.title} merging supports only a file in the original layout"
            )
        weights = model_lookup.open_file(flag, path)
        prefix = find_prefix(weights.shapes, DENOISER_PREFIXES)
        if self.diffusers_mark is not None and prefix + self.diffusers_mark in weights.shapes:
            raise about(flag, path, cause="does not fit")(
                ": this is a transformer in diffusers' layout; use a file in the original layout, which "
                "other programs load"
            )
        if prefix + self.mark not in weights.shapes:
            raise about(flag, path)(f"has no layers of {self.title}'s transformer")
        return weights, prefix
