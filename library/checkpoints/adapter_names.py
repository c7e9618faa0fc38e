"""The names that modules of a base model have in adapter files.

Three namings are in use: `kohya` (`lora_unet_down_blocks_0_...`), `generic` (the module paths of the original
checkpoint below `diffusion_model.` and `text_encoders.`) and `diffusers` (its module paths below `unet.` or
`transformer.`). A base model declares its modules as `BaseNames` in library/architectures/<model>/adapters.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from library.checkpoints.adapter_keys import underscored

FileNaming = Literal["kohya", "generic", "diffusers"]
NAMINGS: tuple[FileNaming, ...] = ("kohya", "generic", "diffusers")


@dataclass(frozen=True)
class Piece:
    """One of the modules that diffusers has where the original checkpoint has one with their rows below each other."""

    diffusers: str
    share: int  # of the rows, in units that all pieces of a module have in common


@dataclass(frozen=True)
class ModuleNames:
    """One module of a base model in every naming, without the end of the key (`.lora_down.weight`)."""

    kohya: str
    generic: str
    diffusers: str | tuple[Piece, ...]
    aliases: tuple[str, ...] = ()  # that other trainers use
    swaps_pair: bool = False  # where its rows are two parts, as many each as it has inputs, diffusers swaps these

    def is_in_diffusers(self, name: str) -> bool:
        """Whether a file calls the whole module by its name in diffusers."""
        return isinstance(self.diffusers, str) and underscored(name) == underscored(self.diffusers)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """diffusers' modules for this one where they are several, in the order of the rows."""
        return () if isinstance(self.diffusers, str) else self.diffusers

    @property
    def spellings(self) -> tuple[str, ...]:
        """Every name that leads to this module."""
        whole = (self.diffusers,) if isinstance(self.diffusers, str) else tuple(p.diffusers for p in self.diffusers)
        return (self.kohya, self.generic, *whole, *self.aliases)

    def piece_of(self, name: str) -> int | None:
        """Which piece a file calls `name`, None for a name of the whole module."""
        flat = underscored(name)
        return next((i for i, piece in enumerate(self.pieces) if underscored(piece.diffusers) == flat), None)


OMI_PREFIXES = {"lora_unet_": "unet_", "lora_te_": "clip_l_", "lora_te1_": "clip_l_", "lora_te2_": "clip_g_"}


def _in_omi(kohya: str) -> str | None:
    """OMI's name of a module, which OneTrainer and sd-scripts read: kohya's path with dots behind its own prefix."""
    found = next((prefix for prefix in OMI_PREFIXES if kohya.startswith(prefix)), None)
    return None if found is None else OMI_PREFIXES[found] + kohya[len(found) :]


@dataclass(frozen=True)
class BaseNames:
    """The modules of one base model that adapters may change."""

    base: str  # `ModelCard.name`
    modules: tuple[ModuleNames, ...]

    @cached_property
    def index(self) -> Mapping[str, ModuleNames]:
        """Every spelling of a module name, with underscores for dots."""
        omi = {other: module for module in self.modules if (other := _in_omi(module.kohya))}
        return omi | {underscored(name): module for module in self.modules for name in module.spellings}

    def find(self, name: str) -> ModuleNames | None:
        """The module that `name` in a file is or is a piece of, None for one that this base model lacks."""
        return self.index.get(underscored(name))
