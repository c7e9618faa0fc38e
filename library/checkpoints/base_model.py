"""A base model's checkpoint as merging and extracting see it: files of weights, and the module each weight is of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from library.checkpoints.adapter_names import BaseNames
from library.checkpoints.weights import Weights


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
    architecture: str = "stable-diffusion-v1"  # modelspec.architecture of a merged file

    @property
    def is_folder(self) -> bool:
        return not (len(self.files) == 1 and self.files[0].part == "")

    def read(self, module: str) -> Tensor:
        """The weight of a module, by kohya's name of it."""
        for file in self.files:
            if module in file.modules:
                return file.read(module)
        raise ValueError(f"{self.path} has no module {module}")
