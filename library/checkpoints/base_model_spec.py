"""What others may know of a base model: its names, how its files are recognised, and what is done with them.

A package of library/architectures declares its specs in spec.py, and nobody outside knows its name: scripts and tools
list the specs of all packages and hand them on.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Literal

from torch import nn

from library.checkpoints.adapter_names import NAMINGS, BaseNames, FileNaming
from library.checkpoints.base_model import BaseModel
from library.options.train import TrainOptions

# --- recognising a file ---

Shapes = Mapping[str, tuple[int, ...]]


class Certainty(IntEnum):
    """How much a sign says; of all base models the one with the surest sign is told."""

    FAMILY = 1  # what several models have, told where nothing else is there
    PART = 2  # names of a part that other models have too, such as a text encoder
    SHARED = 3  # names that another model has too, but with a sign of its own beside them
    OWN = 4  # names or sizes of this model alone


@dataclass(frozen=True)
class Sign:
    """Names in a file, and where names are shared sizes, by which a base model is recognised."""

    pattern: str  # regular expression that is searched for in names
    certainty: Certainty = Certainty.OWN
    width: int | None = None  # what is found has a tensor with so many inputs
    num_axes: int | None = None  # ... with so many axes
    unless: str = ""  # regular expression that no name may have

    def is_in(self, shapes: Shapes) -> bool:
        found = [shape for name, shape in shapes.items() if re.search(self.pattern, name)]
        if self.width is not None:
            found = [shape for shape in found if shape[1:2] == (self.width,)]
        if self.num_axes is not None:
            found = [shape for shape in found if len(shape) == self.num_axes]
        return bool(found) and not (self.unless and any(re.search(self.unless, name) for name in shapes))


# --- what programs that make pictures read ---

Program = Literal["ComfyUI", "Forge", "A1111-style", "diffusers", "stable-diffusion.cpp"]
PROGRAMS: tuple[Program, ...] = ("ComfyUI", "Forge", "A1111-style", "diffusers", "stable-diffusion.cpp")

ALL: frozenset[FileNaming] = frozenset(NAMINGS)
KOHYA: frozenset[FileNaming] = frozenset(("kohya",))
GENERIC: frozenset[FileNaming] = frozenset(("generic",))
DIFFUSERS: frozenset[FileNaming] = frozenset(("diffusers",))
NONE: frozenset[FileNaming] = frozenset()


@dataclass(frozen=True)
class Gap:
    """Modules that a program does not look for, although it reads their naming."""

    namings: frozenset[FileNaming]
    modules: str  # pattern of whole underscored names
    reason: str  # "it ..."


@dataclass(frozen=True)
class Reader:
    """What one program reads of the adapter files of a base model."""

    denoiser: frozenset[FileNaming]  # namings
    text: frozenset[FileNaming]  # the same for the text encoders
    gaps: tuple[Gap, ...] = ()
    refuses: Callable[[Mapping[str, FileNaming | None]], str | None] = lambda modules: None
    """Why it refuses a whole file, by its modules (underscored name -> naming); None where it does not."""


# --- the strength of an adapter by block ---


@dataclass(frozen=True)
class BlockWeights:
    """How lists of block weights speak of a base model: one number for each block that a list of this length names."""

    lists: tuple[tuple[str, ...], ...]  # the names of the blocks, in lists of different lengths
    block_of: Callable[[str], str | None]
    """The block of a module by its generic name; None outside of all blocks."""
    missing: frozenset[str] = frozenset()  # blocks that some list names, but this base model lacks


# --- the spec ---

ArgumentForm = Literal["rank", "ranks", "blocks", "flag", "word"]
"""How the value of a network argument is written: 4; 4,0,4; 0-3,7; True; any text."""


@dataclass(frozen=True)
class BaseModelSpec:
    """One base model as everybody outside its package knows it."""

    name: str  # "knots"; `BaseNames.base` of its modules
    title: str  # "Knots 1"
    called: str  # in messages, with its article: "a Knots"
    script: str  # "knots_train_network.py"
    options: type[TrainOptions]  # of the script
    build: Callable[[Any], Any]  # those options -> library.protocols.Architecture
    checkpoint: tuple[Sign, ...]  # in the names of a single file; of a folder's U-Net they begin with "unet." here
    adapter: tuple[Sign, ...]  # in the keys of adapter files, with underscores for dots
    version: str  # pattern of how ss_base_model_version begins
    architecture: str  # the same of modelspec.architecture
    pipelines: tuple[str, ...]  # how the class names of diffusers' pipelines begin
    readers: Mapping[Program, Reader]  # a program that is not there takes no adapters of it
    names: BaseNames  # what all programs call its modules
    network_arguments: Mapping[str, ArgumentForm]  # that mean something for this base model, and not for all
    open_for_merging: Callable[[str, Path], BaseModel]
    """The checkpoint at a path; the first value is the flag that errors name."""
    seen_by_networks: Callable[[Path], tuple[list[nn.Module], nn.Module]]
    """(text encoders, denoiser) of a checkpoint as network modules see them, on the meta device."""
    adapter_metadata: Callable[[str, bool], Mapping[str, str]]
    """What an adapter for a checkpoint says of it, by `BaseModel.architecture` and whether it predicts velocity."""
    block_weights: BlockWeights | None = None  # None where no program gives it lists of them
    script_flag: str = ""  # with which the script trains it
    prompts_script: str = ""  # that trains concepts from prompts alone
    folders: tuple[str, ...] = ()  # of a diffusers folder with a U-Net, where nothing names its pipeline
    variants: Mapping[str, str] = field(default_factory=dict)  # pattern of names -> what has them, but is not trained


def recognise(
    specs: Sequence[BaseModelSpec], shapes: Shapes, signs_of: Callable[[BaseModelSpec], Sequence[Sign]]
) -> BaseModelSpec | None:
    """The base model with the surest sign in a file, the first of several, None where there is no sign."""
    found = [
        (max((sign.certainty for sign in signs_of(spec) if sign.is_in(shapes)), default=0), spec) for spec in specs
    ]
    certainty, spec = max(found, key=lambda pair: pair[0], default=(0, None))
    return spec if certainty else None
