"""A base model's checkpoint as merging and extracting see it: files of weights, and the module each weight is of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from library.checkpoints import model_lookup
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.checkpoints.weights import Weights, find_prefix
from library.errors import UserError


@dataclass(frozen=True)
class Third:
    """One of the three modules whose rows lie below each other in one tensor: q, k or v."""

    key: str
    number: int

    def of(self, tensor: Tensor) -> Tensor:
        """Its rows, a view."""
        return tensor.chunk(3)[self.number]


@dataclass(frozen=True)
class WeightFile:
    """One part of a checkpoint."""

    part: str  # "" for a single file, "unet" and "text_encoder" in a diffusers folder
    weights: Weights
    stems: Mapping[str, str]  # kohya's name of a module -> its name in the file: weights are `<stem>.weight`
    thirds: Mapping[str, Third] = field(default_factory=dict)  # kohya's name -> where its rows lie

    @property
    def modules(self) -> frozenset[str]:
        """kohya's names of all modules."""
        return frozenset((*self.stems, *self.thirds))

    def read(self, module: str) -> Tensor:
        """The weight of a module."""
        third = self.thirds.get(module)
        if third is None:
            return self.weights.read(f"{self.stems[module]}.weight")
        return third.of(self.weights.read(third.key))

    def shape(self, module: str) -> tuple[int, ...]:
        """The shape of a module's weight."""
        third = self.thirds.get(module)
        if third is None:
            return self.weights.shapes[f"{self.stems[module]}.weight"]
        rows, *rest = self.weights.shapes[third.key]
        return (rows // 3, *rest)


@dataclass(frozen=True)
class BaseModel:
    """A checkpoint whose modules are known by the names of adapter files."""

    path: Path
    files: tuple[WeightFile, ...]
    names: BaseNames
    architecture: str  # modelspec.architecture of a merged file

    @property
    def is_folder(self) -> bool:
        return not (len(self.files) == 1 and self.files[0].part == "")

    def read(self, module: str) -> Tensor:
        """The weight of a module, by kohya's name of it."""
        for file in self.files:
            if module in file.modules:
                return file.read(module)
        raise UserError(f"{self.path} has no module {module}")


def open_original(
    flag: str, path: Path, model: str, prefixes: Sequence[str], diffusers_mark: str
) -> tuple[Weights, str]:
    """(weights of a single file, the first of `prefixes` that its names carry); only its header is read.

    Raises UserError naming `flag` for a folder, for a file that cannot be read, and for one in diffusers' layout,
    which `diffusers_mark` gives away.
    """
    if path.is_dir():
        raise UserError(
            f"{flag} {path}: of {model} only files in the original layout are merged into; give such a file"
        )
    weights = model_lookup.open_file(flag, path)
    prefix = find_prefix(weights.shapes, prefixes)
    if prefix + diffusers_mark in weights.shapes:
        raise UserError(
            f"{flag} {path}: this is a transformer in diffusers' layout; give a file in the original layout, which is "
            "what programs load"
        )
    return weights, prefix


def of_single_file(
    path: Path, weights: Weights, names_of: Callable[[str], ModuleNames | None], base: str, architecture: str
) -> BaseModel:
    """The checkpoint in a single file; `names_of` gives the names of the layer that a weight `<stem>.weight` is of."""
    stems = sorted(key.removesuffix(".weight") for key in weights.shapes if key.endswith(".weight"))
    found = {stem: names for stem in stems if (names := names_of(stem)) is not None}
    file = WeightFile("", weights, {names.kohya: stem for stem, names in found.items()})
    return BaseModel(path, (file,), BaseNames(base, tuple(found.values())), architecture)
