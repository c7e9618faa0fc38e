"""A base model's checkpoint as merging and extracting see it: files of weights, and the module each weight is of."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from library.checkpoints.adapter_names import BaseNames
from library.checkpoints.weights import Weights


@dataclass(frozen=True)
class WeightFile:
    """One part of a checkpoint."""

    part: str  # "" for a single file, "unet" and "text_encoder" in a diffusers folder
    weights: Weights
    stems: Mapping[str, str]  # kohya's name of a module -> its name in the file: weights are `<stem>.weight`


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
            if module in file.stems:
                return file.weights.read(f"{file.stems[module]}.weight")
        raise ValueError(f"{self.path} has no module {module}")
