"""The names of a base model's modules in adapter files.

There are three namings: `kohya` (`lora_unet_down_blocks_0_...`), `generic` (the original checkpoint's module paths
below `diffusion_model.` and `text_encoders.`) and `diffusers` (diffusers' module paths below `unet.` or
`transformer.`). A base model declares its modules as `BaseNames` in library/architectures/<model>/layers.py.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Literal

from library.checkpoints.adapter_keys import MODELS, bare_path, to_underscores

FileNaming = Literal["kohya", "generic", "diffusers"]
NAMINGS: tuple[FileNaming, ...] = ("kohya", "generic", "diffusers")


@dataclass(frozen=True)
class Piece:
    """One of several diffusers modules that the original checkpoint stacks by rows into one module."""

    diffusers: str
    share: int  # number of rows, in a unit common to all pieces of the module
    aliases: tuple[str, ...] = ()  # used by other trainers


@dataclass(frozen=True)
class ModuleNames:
    """One module of a base model in every naming, without the ending of the key (`.lora_down.weight`)."""

    kohya: str
    generic: str
    diffusers: str | tuple[Piece, ...]
    aliases: tuple[str, ...] = ()  # used by other trainers
    swaps_pair: bool = False  # diffusers swaps its two halves of rows, if num_rows == 2 * num_inputs

    def is_in_diffusers(self, name: str) -> bool:
        """Return True if `name` is diffusers' name of the whole module."""
        return isinstance(self.diffusers, str) and to_underscores(name) == to_underscores(self.diffusers)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The diffusers modules that make up this one, in row order; empty if diffusers has it as one module."""
        return () if isinstance(self.diffusers, str) else self.diffusers

    @property
    def spellings(self) -> tuple[str, ...]:
        whole_name = (self.diffusers,) if isinstance(self.diffusers, str) else ()
        piece_names = (name for names in self.names_of_pieces for name in names)
        return (self.kohya, self.generic, *whole_name, *piece_names, *self.aliases)

    @property
    def names_of_pieces(self) -> tuple[tuple[str, ...], ...]:
        """The names of each piece: diffusers' name, the generic name with its number (OMI's format), aliases."""
        return tuple((p.diffusers, f"{self.generic}.{i}", *p.aliases) for i, p in enumerate(self.pieces))

    def piece_of(self, name: str) -> int | None:
        """Return the index of the piece called `name`, or None if `name` is not a piece."""
        flat = to_underscores(name)
        return next((i for i, names in enumerate(self.names_of_pieces) if flat in map(to_underscores, names)), None)

    def rows_of_pieces(self, unit: int) -> list[slice]:
        """Return the rows of each piece, `unit` rows per share."""
        ends = list(accumulate(piece.share * unit for piece in self.pieces))
        return list(map(slice, [0, *ends], ends))

    def in_block(self, number: str) -> "ModuleNames":
        """Return the names of the same layer in block `number`; this one must be in block 0."""

        def renumber(path: str) -> str:
            return path.replace(".0.", f".{number}.", 1)

        diffusers = self.diffusers
        return replace(
            self,
            kohya=self.kohya.replace("_0_", f"_{number}_", 1),
            generic=renumber(self.generic),
            diffusers=renumber(diffusers)
            if isinstance(diffusers, str)
            else tuple(replace(piece, diffusers=renumber(piece.diffusers), aliases=()) for piece in diffusers),
            aliases=(),
        )


OTHER_PREFIXES: Mapping[str, tuple[str, ...]] = {  # used by OMI (OneTrainer, sd-scripts) and networks.oft
    "lora_unet_": ("unet_", "oft_unet_"),
    "lora_te_": ("clip_l_",),
    "lora_te1_": ("clip_l_",),
    "lora_te2_": ("clip_g_",),
    "lora_te3_": ("t5_",),
}


def _add_other_prefixes(kohya: str) -> Iterator[str]:
    """Yield kohya's name of a module with each other prefix that some files use."""
    for prefix, others in OTHER_PREFIXES.items():
        if kohya.startswith(prefix):
            yield from (other + kohya.removeprefix(prefix) for other in others)


def text_module(
    path: str, kohya: str, generic: str, diffusers: str, aliases: tuple[str, ...] = (), *, level: str = ""
) -> ModuleNames:
    """Return the names of a text encoder's module in the three namings.

    The text encoder is called `kohya` ("lora_te3"), `generic` ("t5xxl") and `diffusers` ("text_encoder_2"). The path is
    the same in every naming, except that the generic one may have `level` before it.
    """
    return ModuleNames(
        kohya=f"{kohya}_{path.replace('.', '_')}",
        generic=f"text_encoders.{generic}.transformer.{level}{path}",
        diffusers=f"{diffusers}.{path}",
        aliases=aliases,
    )


@dataclass(frozen=True)
class BaseNames:
    """The modules of one base model that adapters can target."""

    base: str  # `BaseModelSpec.name`
    modules: tuple[ModuleNames, ...]
    stacks: tuple[str, ...] = ()
    """Block lists of variable length, by kohya's name before the block number; `modules` lists those of the usual
    length."""
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Layers that some programs fuse: (end of the fused layer's path, ends of its parts' paths, in equal shares of
    the rows)."""
    joined: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Layers that diffusers alone fuses, in the same form; its naming has the parts only in these tables."""
    saved_naming: FileNaming = "kohya"  # of files that hold LoRA alone; other kinds mostly have kohya's names
    holds_all_kinds_in_diffusers: bool = False  # some program reads kinds other than LoRA under diffusers' names
    published: "BaseNames | None" = None
    """Names of the same layers by the model's publisher, for a table that has only those of diffusers."""

    @cached_property
    def index(self) -> Mapping[str, ModuleNames]:
        """All spellings of module names, with underscores instead of dots."""
        other_spellings = {other: module for module in self.modules for other in _add_other_prefixes(module.kohya)}
        return other_spellings | {to_underscores(name): module for module in self.modules for name in module.spellings}

    def find(self, name: str) -> ModuleNames | None:
        """Return the module that `name` refers to, whole or in part; None if the base model has no such module."""
        flat = to_underscores(name)
        return self.index.get(flat) or self._find_in_longer_stack(flat)

    def find_parts(self, name: str) -> tuple[ModuleNames, ...]:
        """Return the modules that make up a layer that some programs fuse, in row order; () for any other name."""
        flat = to_underscores(name)
        for fused_path, parts in (*self.fused, *self.joined):
            if flat.endswith(end := to_underscores(fused_path)):
                modules = [self.find(flat.removesuffix(end) + to_underscores(part)) for part in parts]
                found = tuple(module for module in modules if module is not None)
                return found if len(found) == len(parts) else ()
        return ()

    def whole_in_diffusers(self, module: ModuleNames) -> ModuleNames | None:
        """Return the layer of diffusers that a module is a part of, with the parts as its pieces and diffusers' name as
        the other names; None for a module that diffusers has, too."""
        path = module.diffusers if isinstance(module.diffusers, str) else ""
        for whole, parts in self.joined:
            stem = next((path.removesuffix(part) for part in parts if path.endswith(f".{part}")), None)
            if stem is not None:
                modules = self.find_parts(name := f"{stem}{whole}")
                return ModuleNames(name, name, tuple(Piece(part.kohya, 1, part.spellings) for part in modules))
        return None

    def _find_in_longer_stack(self, flat: str) -> ModuleNames | None:
        """Find a module in a block beyond the usual number, through the same layer of block 0."""
        # An underscored name does not show which of its numbers is the block's, so each one is tried.
        for number in re.finditer(r"(?<=_)[1-9]\d*(?=_)", flat):
            first = self.index.get(f"{flat[: number.start()]}0{flat[number.end() :]}")
            if first is None or not any(first.kohya.startswith(f"{stack}_0_") for stack in self.stacks):
                continue
            module = first.in_block(number[0])
            if any(to_underscores(spelling) == flat for spelling in module.spellings):
                return module
        return None


def name_by_path(component: str, path: str) -> ModuleNames:
    """Return the names of a layer at diffusers' `path` in a component of a pipeline, where no table has it."""
    return ModuleNames(f"lora_unet_{path.replace('.', '_')}", f"diffusion_model.{path}", f"{component}.{path}")


def add_missing_prefixes(modules: Collection[str], tables: Sequence[BaseNames]) -> dict[str, str]:
    """Map module names that no table knows to names with another prefix that some table knows.

    The table that recognises most of them is used; modules that it does not recognise either are omitted.
    """
    unknown = [name for name in modules if not any(table.find(name) or table.find_parts(name) for table in tables)]
    prefixed: dict[str, str] = {}
    for table in tables if unknown else ():
        candidates = {name: other for name in unknown if (other := _add_model(bare_path(name), table)) is not None}
        prefixed = candidates if len(candidates) > len(prefixed) else prefixed
    return prefixed


def have_own_names(modules: Collection[str], table: BaseNames) -> list[bool]:
    """Return for each module name of a file whether it is the kohya or the generic name of a module in the table."""
    full_names = add_missing_prefixes(modules, [table])
    names = {name: table.find(name) for name in (full_names.get(name, name) for name in modules)}
    return [
        entry is not None and to_underscores(name) in (entry.kohya, to_underscores(entry.generic))
        for name, entry in names.items()
    ]


def _add_model(path: str, table: BaseNames) -> str | None:
    """Prefix a path with the first sub-model of the pipeline that has such a module; None if there is none."""
    names = (f"{model}{path}" for model in MODELS)
    return next((name for name in names if table.find(name) or table.find_parts(name)), None)
