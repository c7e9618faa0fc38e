"""The public facts of a base model: its names, how its files are recognised, and which programs read its adapters.

Each package of library/architectures declares its specs in spec.py. No code outside refers to a particular package:
scripts and tools list the specs of all packages and pass them on.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
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
    """The strength of a sign. The base model with the strongest sign is recognised."""

    FAMILY = 1  # shared by several models; used if nothing stronger is found
    PART = 2  # names of a part that other models also have, such as a text encoder
    NAMES = 3  # names of the layers of its blocks, whatever their size
    OWN = 4  # names together with sizes, or names of layers that make it what it is


@dataclass(frozen=True)
class Sign:
    """Evidence of a base model: what it has. All that a sign lists is required; none lists what other models have."""

    pattern: str  # regular expression, searched in tensor names
    certainty: Certainty = Certainty.OWN
    width: int | None = None  # a matching tensor must have this many inputs
    num_axes: int | None = None  # and this many dimensions
    every_name: str = ""  # regular expression that every name in the file must match

    def is_in(self, shapes: Shapes) -> bool:
        matching = [shape for name, shape in shapes.items() if re.search(self.pattern, name)]
        if self.width is not None:
            matching = [shape for shape in matching if shape[1:2] == (self.width,)]
        if self.num_axes is not None:
            matching = [shape for shape in matching if len(shape) == self.num_axes]
        return bool(matching) and all(re.search(self.every_name, name) for name in shapes)


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
    """Modules that a program ignores, although it reads their naming."""

    namings: frozenset[FileNaming]
    modules: str  # pattern of complete underscored names
    reason: str  # "it ..."


@dataclass(frozen=True)
class Reader:
    """The adapter files of a base model that one program can read."""

    denoiser: frozenset[FileNaming]  # namings read
    text: frozenset[FileNaming]  # namings read, for the text encoders
    gaps: tuple[Gap, ...] = ()
    refuses: Callable[[Mapping[str, FileNaming | None]], str | None] = lambda modules: None
    """Maps (underscored module name -> naming) to the reason why the program refuses the whole file, or None."""


# --- the strength of an adapter by block ---


@dataclass(frozen=True)
class BlockWeights:
    """Lists of per-block strengths for a base model, one layout for each supported list length."""

    lists: tuple[tuple[str, ...], ...]  # one tuple of block names per list length
    block_of: Callable[[str], str | None]
    """Maps a module's generic name to its block; None if it is in no block."""
    missing: frozenset[str] = frozenset()  # blocks in some layout that this base model lacks


# --- the spec ---

ArgumentForm = Literal["rank", "ranks", "blocks", "flag", "word"]
"""Forms of a network argument's value: `4`; `4,0,4`; `0-3,7`; `True`; any text."""


@dataclass(frozen=True)
class BaseModelSpec:
    """The public facts of one base model, for code outside its package."""

    name: str  # "knots"; `BaseNames.base` of its modules
    title: str  # "Knots 1"
    called: str  # with article, for messages: "a Knots"
    script: str  # "knots_train_network.py"
    options: type[TrainOptions]  # of the script
    build: Callable[[Any], Any]  # maps those options to a library.protocols.Architecture
    latents: Any  # a library.protocols.LatentSpec, which determines bucket sizes without a base model
    checkpoint: tuple[Sign, ...]  # in tensor names of a single file; a folder's U-Net gets the prefix "unet."
    adapter: tuple[Sign, ...]  # in keys of adapter files, with underscores for dots
    version: str  # regular expression for the start of ss_base_model_version
    architecture: str  # regular expression for the start of modelspec.architecture
    pipelines: tuple[str, ...]  # prefixes of its diffusers pipeline class names
    readers: Mapping[Program, Reader]  # programs not listed read no adapters of this model
    names: BaseNames  # its modules in all namings
    network_arguments: Mapping[str, ArgumentForm]  # specific to this base model
    open_for_merging: Callable[[str, Path], BaseModel]
    """Opens the checkpoint at a path. The first argument is the flag for error messages."""
    view_for_networks: Callable[[Path], tuple[list[nn.Module], nn.Module]]
    """Returns (text encoders, denoiser) of a checkpoint on the meta device, as network modules see them."""
    adapter_metadata: Callable[[str, bool], Mapping[str, str]]
    """Returns the metadata of an adapter, from `BaseModel.architecture` and whether the model predicts velocity."""
    ignores: Mapping[str, str] = field(default_factory=dict)  # options without effect, each with the reason
    objective: Callable[[Any], Any] | None = None  # maps the options to the FlowMatching of a flow model
    block_weights: BlockWeights | None = None  # None if no program uses such lists for it
    script_flag: str = ""  # selects this model if the script trains several
    prompts_script: str = "train_leco.py"  # trains concepts from prompts alone
    folders: tuple[str, ...] = ()  # identify a diffusers folder with a U-Net that names no pipeline
    build_to_draw: Callable[[Any], Any] | None = None  # as `build`, for tools/draw.py; None for `build` itself
    names_of: Callable[[str, Collection[str]], BaseNames | None] = lambda pipeline, modules: None
    """Maps a pipeline's class and the modules in an adapter file to their names, for pipelines without a spec."""
    find_published: Callable[[Collection[str]], str] = lambda modules: ""
    """Returns the class of such a pipeline whose publisher names layers like these modules; "" if none does."""
    variants: Mapping[str, str] = field(default_factory=dict)  # pattern of names -> unsupported model that has them

    @property
    def is_general(self) -> bool:
        """True for pipelines that have no spec of their own: it recognises no file and no pipeline."""
        return not self.checkpoint and not self.pipelines


def recognise(
    specs: Sequence[BaseModelSpec],
    shapes: Shapes,
    signs_of: Callable[[BaseModelSpec], Sequence[Sign]],
    count_known: Callable[[BaseModelSpec], int] = lambda spec: 0,
) -> BaseModelSpec | None:
    """Return the base model with the strongest sign in a file, or None if there is no sign.

    Of equally strong ones, `count_known` decides, by how much of the file each model knows, then their order.
    """
    certainties = [max((sign.certainty for sign in signs_of(s) if sign.is_in(shapes)), default=0) for s in specs]
    strongest = max(certainties, default=0)
    if not strongest:
        return None
    rivals = [spec for spec, certainty in zip(specs, certainties, strict=True) if certainty == strongest]
    return rivals[0] if len(rivals) == 1 else max(rivals, key=count_known)


def bases_of_pipeline(specs: Sequence[BaseModelSpec], class_name: str) -> tuple[BaseModelSpec, ...]:
    """Return the base models that list the longest matching prefix of a diffusers pipeline's class name, of whole
    words: a longer word that begins with one is none."""
    lengths = [
        max((len(s) for s in spec.pipelines if re.match(rf"{s}(?![a-z])", class_name)), default=0) for spec in specs
    ]
    return tuple(spec for spec, length in zip(specs, lengths, strict=True) if length and length == max(lengths))
