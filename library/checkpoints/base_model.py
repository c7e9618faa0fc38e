"""A base model's checkpoint as merging and extraction see it: its files, and the module of each weight."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from library.base.errors import of_file
from library.checkpoints.adapter_names import BaseNames, ModuleNames
from library.checkpoints.weights import Weights


@dataclass(frozen=True)
class Third:
    """The location of q, k or v in one tensor that stacks the rows of all three."""

    key: str
    number: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return a view of this third's rows."""
        return tensor.chunk(3)[self.number]


@dataclass(frozen=True)
class WeightFile:
    """One part of a checkpoint."""

    part: str  # "" for a single file, "unet" and "text_encoder" in a diffusers folder
    weights: Weights
    stems: Mapping[str, str]  # kohya's module name -> its stem in the file: the weight is `<stem>.weight`
    thirds: Mapping[str, Third] = field(default_factory=dict)  # kohya's module name -> the location of its rows

    @property
    def modules(self) -> frozenset[str]:
        """kohya's names of all modules in this file."""
        return frozenset((*self.stems, *self.thirds))

    def read(self, module: str) -> Tensor:
        third = self.thirds.get(module)
        if third is None:
            return self.weights.read(f"{self.stems[module]}.weight")
        return third.of(self.weights.read(third.key))

    def shape(self, module: str) -> tuple[int, ...]:
        third = self.thirds.get(module)
        if third is None:
            return self.weights.shapes[f"{self.stems[module]}.weight"]
        rows, *rest = self.weights.shapes[third.key]
        return (rows // 3, *rest)


@dataclass(frozen=True)
class BaseModel:
    """A checkpoint, with its modules by their names in adapter files."""

    path: Path
    files: tuple[WeightFile, ...]
    names: BaseNames
    architecture: str  # modelspec.architecture of a merged file
    names_in_file: Callable[[Mapping[str, str], str], BaseNames] | None = None
    """Maps (metadata, path) of an adapter file to the modules by their names in that file, where it depends on the
    file; raises UserError for a file that does not say it."""

    @property
    def modules(self) -> frozenset[str]:
        """kohya's names of all modules."""
        return frozenset[str]().union(*(file.modules for file in self.files))

    @property
    def is_folder(self) -> bool:
        return not (len(self.files) == 1 and self.files[0].part == "")

    def read(self, module: str) -> Tensor:
        """Read the weight of a module, by kohya's name, or of a part of a fused one. Raises UserError if there is
        none."""
        location = self._find(module)
        if location is None:
            raise of_file(self.path)(f"has no module {module}")
        file, name, rows = location
        return file.read(name)[rows]

    def shape(self, module: str) -> tuple[int, ...] | None:
        """Return the shape of the weight that `read` returns; None if there is none."""
        location = self._find(module)
        if location is None:
            return None
        file, name, rows = location
        num_rows, *rest = file.shape(name)
        return len(range(num_rows)[rows]), *rest

    def _find(self, module: str) -> tuple[WeightFile, str, slice] | None:
        """Return (the file that has a module, its name there, its rows): a part of a fused module has some of the
        rows, any other module all."""
        names = self.names.find(module)
        piece = None if names is None else names.piece_of(module)
        for file in self.files:
            if module in file.modules:
                return file, module, slice(None)
            if names is not None and piece is not None and names.kohya in file.modules:
                unit = file.shape(names.kohya)[0] // sum(piece.share for piece in names.pieces)
                return file, names.kohya, names.rows_of_pieces(unit)[piece]
        return None


def open_single_file(
    path: Path, weights: Weights, names_of: Callable[[str], ModuleNames | None], base: str, architecture: str
) -> BaseModel:
    """Open a single-file checkpoint; `names_of` maps the stem of `<stem>.weight` to the module's names, or None."""
    stems = sorted(key.removesuffix(".weight") for key in weights.shapes if key.endswith(".weight"))
    names_by_stem = {stem: names for stem in stems if (names := names_of(stem)) is not None}
    file = WeightFile("", weights, {names.kohya: stem for stem, names in names_by_stem.items()})
    return BaseModel(path, (file,), BaseNames(base, tuple(names_by_stem.values())), architecture)
