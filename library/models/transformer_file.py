"""A base model's transformer in files, for training it, merging adapters into it and extracting them; and the
fields of the spec of a base model with such a transformer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from library.base.errors import about
from library.checkpoints import model_lookup
from library.checkpoints.adapter_names import ModuleNames
from library.checkpoints.base_files import BaseFiles
from library.checkpoints.base_model import BaseModel, open_single_file
from library.checkpoints.base_model_spec import BaseModelSpec
from library.checkpoints.weights import Weights, configure, find_prefix, select_weights, with_prefix
from library.models.adapter_views import view_denoiser
from library.models.identify import DENOISER_PREFIXES, open_denoiser
from library.models.loading import build_on_meta_device
from library.models.recipe import Recipe, Values
from library.models.shapes import Shapes
from library.options.base import Options
from library.protocols import AdapterView, Architecture, LatentSpec, Loader, Objective
from networks.core.targets.targets import AdapterTargets


@dataclass(frozen=True)
class TransformerFile:
    """A base model's transformer: a file of the original layout, which may also hold text encoders and VAE, or a
    diffusers folder."""

    base: str  # `BaseModelSpec.name`
    title: str  # in messages
    architecture: str | Callable[[Weights], str]  # modelspec.architecture of merged files, or a function of the weights
    mark: str  # a weight that every such transformer has
    diffusers_mark: str | None  # a weight that only diffusers' layout has
    is_layer: Callable[[str], bool]  # True for the path of a layer that adapters may target
    name: Callable[[str], ModuleNames]  # names of a layer by its path
    build: Callable[[Any], nn.Module]
    read_config: Callable[[Shapes], Any]
    from_diffusers: Callable[[Weights], Weights] = lambda weights: weights  # renames weights of diffusers' layout
    split_fused: Callable[[Weights], Weights] = lambda weights: weights  # splits what some files fuse
    unused: tuple[str, ...] = ()  # parts of the names of weights that the model does not use
    view: AdapterView = view_denoiser
    name_text_layer: Callable[[str], ModuleNames | None] = lambda stem: None  # by its full name in the file

    def read(self, specs: Sequence[BaseModelSpec], base: BaseFiles) -> Weights:
        """Return the denoiser's weights under our names. Raises UserError for another model, naming it."""
        weights = self.split_fused(
            open_denoiser(specs, base, self.base, self.mark, self.diffusers_mark, self.from_diffusers)
        )
        used = (key for key in weights.shapes if not any(part in key for part in self.unused))
        return select_weights(weights, {key: key for key in used})

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
                ": this is a transformer in diffusers' layout",
                "use a file in the original layout, which other programs load",
            )
        if prefix + self.mark not in weights.shapes:
            raise about(flag, path)(f"has no layers of {self.title}'s transformer")
        return weights, prefix


def file_parts(
    file: TransformerFile,
    recipe: Recipe,
    options: Values,
    loader: Loader,
    specs: Sequence[BaseModelSpec],
    **metadata: str,
) -> dict[str, Any]:
    """Return the parts of an `Architecture` that follow from its transformer's file; `metadata` as for
    `Recipe.describe`."""
    return {
        "name": file.base,
        "load": loader,
        "view": file.view,
        "metadata": recipe.describe(options, **metadata),
        "specs": specs,
        "ignores": recipe.ignores,
    }


def transformer_fields(
    file: TransformerFile,
    targets: AdapterTargets,
    recipe: Recipe,
    options: type[Options],
    build: Callable[[Any], Architecture],
    objective: Callable[[Any], Objective],
    latents: LatentSpec,
    **own: Any,
) -> dict[str, Any]:
    """Return the fields of `BaseModelSpec` that follow from a flow model's transformer and its assembly; `own` replaces
    some of them."""
    assert targets.names is not None
    return {
        "name": file.base,
        "title": file.title,
        "called": f"a {file.title}",
        "script": f"{file.base}_train_network.py",
        "names": targets.names,
        "network_arguments": targets.arguments,
        "open_for_merging": file.open,
        "view_for_networks": file.view_for_networks,
        "adapter_metadata": recipe.of_checkpoint,
        "options": options,
        "build": build,
        "objective": objective,
        "latents": latents,
        "ignores": recipe.ignores,
        **own,
    }
