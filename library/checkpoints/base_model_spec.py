"""The public facts of a base model: its names, how its files are recognised, and which programs read its adapters.

A package of library/architectures declares its specs in spec.py, and no code outside names a package: scripts and tools
list the specs of all packages and pass them on.
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
    """The strength of a sign; the base model with the strongest sign is recognised."""

    FAMILY = 1  # common to several models; used if nothing else is found
    PART = 2  # names of a part shared with other models, such as a text encoder
    SHARED = 3  # names that another model has too, together with a sign of its own
    OWN = 4  # names or sizes of only this model


@dataclass(frozen=True)
class Sign:
    """Names in a file, and sizes where names are shared, by which a base model is recognised."""

    pattern: str  # regular expression, searched in names
    certainty: Certainty = Certainty.OWN
    width: int | None = None  # a matching tensor has this many inputs
    num_axes: int | None = None  # ... and this many axes
    unless: str = ""  # regular expression that no name may match

    def is_in(self, shapes: Shapes) -> bool:
        found = [shape for name, shape in shapes.items() if re.search(self.pattern, name)]
        if self.width is not None:
            found = [shape for shape in found if shape[1:2] == (self.width,)]
        if self.num_axes is not None:
            found = [shape for shape in found if len(shape) == self.num_axes]
        return bool(found) and not (self.unless and any(re.search(self.unless, name) for name in shapes))


# --- what inference programs read ---

Program = Literal["ComfyUI", "Forge", "A1111-style", "diffusers", "stable-diffusion.cpp"]
PROGRAMS: tuple[Program, ...] = ("ComfyUI", "Forge", "A1111-style", "diffusers", "stable-diffusion.cpp")

ALL: frozenset[FileNaming] = frozenset(NAMINGS)
KOHYA: frozenset[FileNaming] = frozenset(("kohya",))
GENERIC: frozenset[FileNaming] = frozenset(("generic",))
DIFFUSERS: frozenset[FileNaming] = frozenset(("diffusers",))
NONE: frozenset[FileNaming] = frozenset()


@dataclass(frozen=True)
class Gap:
    """Modules that a program ignores although it reads their naming."""

    namings: frozenset[FileNaming]
    modules: str  # pattern of complete underscored names
    reason: str  # "it ..."


@dataclass(frozen=True)
class Reader:
    """The adapter files of a base model that one program reads."""

    denoiser: frozenset[FileNaming]  # namings read
    text: frozenset[FileNaming]  # namings read for the text encoders
    gaps: tuple[Gap, ...] = ()
    refuses: Callable[[Mapping[str, FileNaming | None]], str | None] = lambda modules: None
    """Returns why the program refuses a whole file, from its modules (underscored name -> naming); None if it does
    not."""


# --- the strength of an adapter by block ---


@dataclass(frozen=True)
class BlockWeights:
    """Lists of block weights for a base model: one number for each block that a list of this length names."""

    lists: tuple[tuple[str, ...], ...]  # block names, in lists of different lengths
    block_of: Callable[[str], str | None]
    """Returns the block of a module by its generic name; None outside of all blocks."""
    missing: frozenset[str] = frozenset()  # blocks in some list that this base model lacks


# --- the spec ---

ArgumentForm = Literal["rank", "ranks", "blocks", "flag", "word"]
"""Forms of a network argument's value: 4; 4,0,4; 0-3,7; True; any text."""


@dataclass(frozen=True)
class BaseModelSpec:
    """One base model as code outside its package sees it."""

    name: str  # "knots"; `BaseNames.base` of its modules
    title: str  # "Knots 1"
    called: str  # with article, for messages: "a Knots"
    script: str  # "knots_train_network.py"
    options: type[TrainOptions]  # of the script
    build: Callable[[Any], Any]  # those options -> library.protocols.Architecture
    checkpoint: tuple[Sign, ...]  # in names of a single file; a folder's U-Net gets the prefix "unet."
    adapter: tuple[Sign, ...]  # in keys of adapter files, with underscores for dots
    version: str  # pattern at the start of ss_base_model_version
    architecture: str  # pattern at the start of modelspec.architecture
    pipelines: tuple[str, ...]  # prefixes of the class names of its diffusers pipelines
    readers: Mapping[Program, Reader]  # programs not listed read no adapters of it
    names: BaseNames  # its modules in all namings
    network_arguments: Mapping[str, ArgumentForm]  # specific to this base model
    open_for_merging: Callable[[str, Path], BaseModel]
    """Opens the checkpoint at a path; the first argument is the flag for error messages."""
    view_for_networks: Callable[[Path], tuple[list[nn.Module], nn.Module]]
    """Returns (text encoders, denoiser) of a checkpoint as network modules see them, on the meta device."""
    adapter_metadata: Callable[[str, bool], Mapping[str, str]]
    """Returns the metadata of an adapter for a checkpoint, from `BaseModel.architecture` and whether it predicts
    velocity."""
    block_weights: BlockWeights | None = None  # None if no program uses such lists for it
    script_flag: str = ""  # with which the script trains it
    prompts_script: str = "train_leco.py"  # that trains concepts from prompts alone
    folders: tuple[str, ...] = ()  # in a diffusers folder with a U-Net that names no pipeline
    variants: Mapping[str, str] = field(default_factory=dict)  # pattern of names -> unsupported model that has them


def recognise(
    specs: Sequence[BaseModelSpec], shapes: Shapes, signs_of: Callable[[BaseModelSpec], Sequence[Sign]]
) -> BaseModelSpec | None:
    """Return the base model with the strongest sign in a file, the first of equals; None if there is no sign."""
    found = [
        (max((sign.certainty for sign in signs_of(spec) if sign.is_in(shapes)), default=0), spec) for spec in specs
    ]
    certainty, spec = max(found, key=lambda pair: pair[0], default=(0, None))
    return spec if certainty else None
