"""The names that modules of a base model have in adapter files.

Three namings are in use: `kohya` (`lora_unet_down_blocks_0_...`), `generic` (the module paths of the original
checkpoint below `diffusion_model.` and `text_encoders.`) and `diffusers` (its module paths below `unet.` or
`transformer.`). A base model declares its modules as `BaseNames` in library/architectures/<model>/adapters.py.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from library.checkpoints.adapter_keys import MODELS, path_alone, underscored

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
        whole = (self.diffusers,) if isinstance(self.diffusers, str) else ()
        of_pieces = (name for names in self.names_of_pieces for name in names)
        return (self.kohya, self.generic, *whole, *of_pieces, *self.aliases)

    @property
    def names_of_pieces(self) -> tuple[tuple[str, str], ...]:
        """What files call each piece: as diffusers does, or by its number in the whole, as OMI's format does."""
        return tuple((piece.diffusers, f"{self.generic}.{i}") for i, piece in enumerate(self.pieces))

    def piece_of(self, name: str) -> int | None:
        """Which piece a file calls `name`, None for a name of the whole module."""
        flat = underscored(name)
        return next((i for i, names in enumerate(self.names_of_pieces) if flat in map(underscored, names)), None)

    def in_block(self, number: str) -> "ModuleNames":
        """The names of the same layer in another block, of a layer in block 0 whose paths have no earlier number."""

        def moved(path: str) -> str:
            return path.replace(".0.", f".{number}.", 1)

        whole = self.diffusers
        return replace(
            self,
            kohya=self.kohya.replace("_0_", f"_{number}_", 1),
            generic=moved(self.generic),
            diffusers=moved(whole)
            if isinstance(whole, str)
            else tuple(replace(piece, diffusers=moved(piece.diffusers)) for piece in whole),
            aliases=(),
        )


OTHER_PREFIXES: Mapping[str, tuple[str, ...]] = {  # OMI's, of which OneTrainer and sd-scripts speak, and networks.oft's
    "lora_unet_": ("unet_", "oft_unet_"),
    "lora_te_": ("clip_l_",),
    "lora_te1_": ("clip_l_",),
    "lora_te2_": ("clip_g_",),
    "lora_te3_": ("t5_",),
}


def _behind_other_prefixes(kohya: str) -> Iterator[str]:
    """Kohya's name of a module with the prefixes that some files have before the same path."""
    for prefix, others in OTHER_PREFIXES.items():
        if kohya.startswith(prefix):
            yield from (other + kohya.removeprefix(prefix) for other in others)


@dataclass(frozen=True)
class BaseNames:
    """The modules of one base model that adapters may change."""

    base: str  # `BaseModelSpec.name`
    modules: tuple[ModuleNames, ...]
    stacks: tuple[str, ...] = ()
    """Lists of blocks of any length, by kohya's name before the number; `modules` has those of the usual length."""

    @cached_property
    def index(self) -> Mapping[str, ModuleNames]:
        """Every spelling of a module name, with underscores for dots."""
        others = {other: module for module in self.modules for other in _behind_other_prefixes(module.kohya)}
        return others | {underscored(name): module for module in self.modules for name in module.spellings}

    def find(self, name: str) -> ModuleNames | None:
        """The module that `name` in a file is or is a piece of, None for one that this base model lacks."""
        flat = underscored(name)
        return self.index.get(flat) or self._find_in_longer_stack(flat)

    def _find_in_longer_stack(self, flat: str) -> ModuleNames | None:
        """A module of a block beyond the usual ones, told by the same layer of block 0."""
        for number in re.finditer(r"(?<=_)[1-9]\d*(?=_)", flat):
            first = self.index.get(f"{flat[: number.start()]}0{flat[number.end() :]}")
            if first is None or not any(first.kohya.startswith(f"{stack}_0_") for stack in self.stacks):
                continue
            module = first.in_block(number[0])
            if any(underscored(spelling) == flat for spelling in module.spellings):
                return module
        return None


def placed(modules: Collection[str], tables: Sequence[BaseNames]) -> dict[str, str]:
    """The modules of a file that no table knows by their names, but some table under another beginning -> that name.

    Of the tables the one counts that knows most of them; what it does not know either is left out.
    """
    strangers = [name for name in modules if not any(table.find(name) for table in tables)]
    found: dict[str, str] = {}
    for table in tables if strangers else ():
        here = {name: other for name in strangers if (other := _under_a_model(path_alone(name), table)) is not None}
        found = here if len(here) > len(found) else found
    return found


def _under_a_model(path: str, table: BaseNames) -> str | None:
    """A path as the first model of a base model has it in which it is."""
    return next((f"{model}{path}" for model in MODELS if table.find(f"{model}{path}") is not None), None)
